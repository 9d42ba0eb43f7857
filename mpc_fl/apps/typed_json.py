"""Values of JSON files as frozen dataclasses: what is missing or of another type is refused with one line. Pure.

Files of a run may have been damaged, or written by another version: keys that a dataclass does not have are passed over,
keys that have a default may be missing. No value is converted, so that writing what was read gives the same text.
"""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mpc_fl.errors import DataError

T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}


def typed(kind: type[T], value: object, where: str) -> T:
    """The JSON object `value` as the dataclass `kind`; fields may be plain, optional, lists, mappings or dataclasses.

    `where` names the file. Raises `DataError` naming the key.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object")
    hints, given = _hints(kind), {}  # type: ignore[arg-type]  # mypy: a type of dataclasses is hashable
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            given[field.name] = _checked(hints[field.name], value[field.name], f"{where}: '{field.name}'")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(f"{where} lacks '{field.name}'")
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """`value` where it is of the type `hint`, JSON objects as dataclasses. Raises `DataError`."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):  # of a type or None: what is wrong is told about the type
        return None if value is None and types.NoneType in arguments else _checked(arguments[0], value, where)
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _checked(arguments[1], item, where) for key, item in value.items()}
    if get_origin(hint) is list and isinstance(value, list):
        return [_checked(arguments[0], item, where) for item in value]
    if get_origin(hint) is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_checked(part, item, where) for part, item in zip(arguments, value, strict=True))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return typed(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in _KINDS and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise DataError(f"{where} is not {_KINDS.get(hint, 'of the form that this version reads')}")
