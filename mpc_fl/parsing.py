"""Texts of files, as JSON and YAML: a value that the rest of the program can hold, or `ValueError`, whatever the bytes are. Pure.

Python's own readers take more than the formats allow, and more than a program can go on with: NaN and infinities, a key twice
(the last wins), numbers of thousands of digits; deep nesting ends in `RecursionError`, YAML's aliases in structures without
end. All of that is refused here, with a reason in a few words that quotes nothing of the text but, of YAML, a key that comes
twice. What is returned can be walked, written as JSON, and its numbers converted to floats. Texts may hold halves of
characters: names of files that are not UTF-8.

Every reader of a file comes here; who reads names the file, and says what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mpc_fl.errors import printable

if TYPE_CHECKING:
    import yaml

DEEPEST = 64  # levels of lists and objects
_MOST_DIGITS = 100  # of a whole number; every one of these has a float
_MOST_NODES = 100_000  # of a YAML file, each as often as it is referred to
_LONGEST_KEY = 60  # that is shown
_TEXT = "tag:yaml.org,2002:str"
_WHOLE = "tag:yaml.org,2002:int"
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 if given as bytes. Raises `ValueError`."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    _require_shallow(value)
    return value


def parse_json_lines(text: str | bytes) -> list[Any]:
    """The values of all whole lines; a last line without end, cut off by a crash, is none. Raises `ValueError` naming the line."""
    lines: list[str | bytes] = [*(text.split("\n") if isinstance(text, str) else text.split(b"\n"))][:-1]
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return values


def _no_number(_: str) -> float:
    raise ValueError("not JSON: it holds NaN or an infinity")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("beyond all numbers")
    return value


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("a number of too many digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("ambiguous: a key comes twice")
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for item in level if isinstance(item, (dict, list)) for part in _parts(item)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _parts(item: dict[str, Any] | list[Any]) -> Iterator[Any]:
    return iter(item.values() if isinstance(item, dict) else item)


# ---- YAML --------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, takes_text: Callable[[tuple[str, ...]], bool] = lambda _: False) -> Any:
    """The value of a YAML text, with keys that are texts. Raises `ValueError`, whose words begin with the line if it is known.

    Infinities and NaN are numbers in YAML: who takes a number says which. `takes_text` says whether a value is a text where it
    stands, by the keys that lead there and an empty one for each element of a list: `007` and `yes` are then what they look like.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_sound(node, takes_text)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{'' if mark is None else f'line {mark.line + 1}: '}not valid YAML") from None
    except yaml.YAMLError:
        raise ValueError("not valid YAML") from None
    except _UnsoundError as error:
        raise ValueError(str(error)) from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):  # of a value that is not of its tag
        raise ValueError("not valid YAML: a value is not of its kind, or has too many digits") from None


class _UnsoundError(Exception):
    """YAML that is valid and cannot be used."""


def _require_sound(root: yaml.Node, takes_text: Callable[[tuple[str, ...]], bool]) -> None:
    """Walk what the text stands for, an alias as often as it comes: neither deep nor long, with keys that are texts and differ.

    Values that are texts where they stand become that.
    """
    import yaml

    waiting, seen = [(root, tuple[str, ...]())], 0
    while waiting:
        node, path = waiting.pop()
        seen, line, depth = seen + 1, f"line {node.start_mark.line + 1}: ", len(path)
        if depth > DEEPEST or seen > _MOST_NODES:
            raise _UnsoundError(f"{line}nested too deeply, or an alias refers to itself or comes too often")
        if node.tag == _WHOLE and len(node.value) > _MOST_DIGITS:
            raise _UnsoundError(f"{line}a number of too many digits")
        if isinstance(node, yaml.ScalarNode) and node.tag not in (_TEXT, _NULL) and takes_text(path):
            node.tag = _TEXT
        if isinstance(node, yaml.SequenceNode):
            waiting += [(part, (*path, "")) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            if any(key.tag not in (_TEXT, _MERGE) or not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
                raise _UnsoundError(f"{line}a key is no text; quote it")
            keys = [key.value for key, _ in node.value]
            if len(set(keys)) != len(keys):
                twice = next(key for index, (key, _) in enumerate(node.value) if key.value in keys[:index])
                raise _UnsoundError(
                    f"line {twice.start_mark.line + 1}: the key '{printable(twice.value, _LONGEST_KEY)}' comes twice"
                )
            waiting += [(part, (*path, key.value)) for key, part in node.value]


def yaml_lines(text: str) -> dict[str, int]:
    """The line of each key of a YAML text that `parse_yaml` reads, from 1, by its dotted name."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    found, waiting = dict[str, int](), [(root, "")]
    while waiting:
        node, prefix = waiting.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found[f"{prefix}{key.value}"] = key.start_mark.line + 1
            waiting.append((value, f"{prefix}{key.value}."))
    return found
