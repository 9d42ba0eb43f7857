"""What is wrong with the values of a section, in one line: the key, and the nearest known one."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mpc_fl.errors import ConfigError


def section_of(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section of that name within another, also one that may be left out (null); None when there is none."""
    field = section.model_fields.get(name)
    for kind in () if field is None else (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _listed_section(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a setting is a list of; None when it is no such list."""
    field = section.model_fields.get(name)
    kinds = [kind for part in get_args(field.annotation) for kind in get_args(part)] if field is not None else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_names(whole: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] | None = whole
    for name in path:
        if section is not None and not isinstance(name, int):  # a number is the place in a list of sections
            section = section_of(section, str(name)) or _listed_section(section, str(name))
    return [] if section is None else list(section.model_fields)


def explained(whole: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    """The first mistake of values for the section `whole`, by the key; for an unknown key also the nearest known one."""
    first = error.errors()[0]
    path = first["loc"]
    dotted = ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        known = _known_names(whole, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
        prefix = ".".join(str(part) for part in path[:-1])
        suggestion = f"{prefix}.{near[0]}" if near and prefix else (near[0] if near else "nothing here")
        return ConfigError(f"{source}: unknown key '{dotted}'", f"the nearest known name is '{suggestion}'")
    message = str(first["msg"]).removeprefix("Value error, ")
    if not path:  # sections that do not go together
        return ConfigError(source, message)
    return ConfigError(f"{source}: '{dotted}' is not valid", f"{message} (got {str(first.get('input'))[:60]!r})")
