"""What every setting is: its key, what it may be, its default, and what it does, read from the sections themselves. Pure.

So that a page of all keys, `mpc-fl config explain`, and a schema for editors are never other than what is checked.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mpc_fl.config.config import Config
from mpc_fl.config.examples import EXAMPLES
from mpc_fl.config.mistakes import section_of
from mpc_fl.config.section import LARGEST
from mpc_fl.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One setting: `key` as `--set` takes it, `kind` in words, `default` as YAML writes it, `about` what it does.

    `example` is a value that it takes, as `--set` takes it, and another than the default where the kind says one. `section` is
    the text of the section that it is in, which says how its settings go together.
    """

    key: str
    kind: str
    default: str
    about: str
    example: str
    section: str


@dataclass(frozen=True)
class SectionText:
    """A section: its key (empty for the whole configuration), what it is about, and its own settings."""

    key: str
    about: str
    settings: tuple[Setting, ...]


def sections() -> tuple[SectionText, ...]:
    """All sections in the order in which a configuration is written, each before those within it."""
    return tuple(_sections(Config, "", Config.model_json_schema()))


def setting(key: str) -> Setting:
    """The setting of that key. Raises `ConfigError` naming the nearest setting or section."""
    known = {item.key: item for section in sections() for item in section.settings}
    if key not in known:
        called_so = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        names = called_so or [*known, *(section.key for section in sections() if section.key)]
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no setting '{key}'", f"the nearest known name is '{nearest}'")
    return known[key]


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a configuration file, for editors that complete and check while one types."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def takes_text(path: tuple[str, ...]) -> bool:
    """Whether what stands at this path is a text, never a number or a truth value: then `0` and `yes` are texts there.

    `path` has the keys that lead there, an empty one for each element of a list.
    """
    kind: Any = Config
    for name in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(name)
            kind = None if field is None else _without_null(field.annotation)
        else:
            kind = _element(kind)
    return kind in (str, Path)


def _without_null(kind: Any) -> Any:
    """What a value may be besides null, where that is one thing."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    return kinds[0] if len(kinds) == 1 else kind


def _element(kind: Any) -> Any:
    """What each element of a tuple, or each value of a mapping, is; `None` where there is none."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return arguments[1] if get_origin(kind) is dict else None


def _sections(section: type[BaseModel], key: str, whole: dict[str, Any]) -> Iterator[SectionText]:
    text, inner, own = _text(section), list[SectionText](), list[Setting]()
    definition = whole if not key else whole["$defs"][section.__name__]
    for name, field in section.model_fields.items():
        here, within = f"{key}.{name}".removeprefix("."), section_of(section, name)
        if within is not None:
            inner += _sections(within, here, whole)
            continue
        of = definition["properties"][name]
        default = _yaml(field.get_default(call_default_factory=True))
        about = " ".join((field.description or "").split())
        own.append(Setting(here, _kind(of, whole), default, about, _example(here, of, default), text))
    yield SectionText(key, text, tuple(own))
    yield from inner


def _text(section: type[BaseModel]) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _yaml(value: Any) -> str:
    """A default as it would be written in a configuration."""
    value = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _example(key: str, of: dict[str, Any], default: str) -> str:
    """A value that is chosen from few, if it can be another than the default; else what `EXAMPLES` has, else the default."""
    choices = [
        choice
        for part in of.get("anyOf", [of])
        for choice in part.get("enum", [True, False] if part.get("type") == "boolean" else [])
    ]
    others = [text for text in map(_yaml, choices) if text != default]
    return others[0] if others else EXAMPLES.get(key, default)


def _kind(of: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a value may be, in words, from its part of the JSON Schema."""
    if "$ref" in of:
        return _kind(whole["$defs"][of["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(_kind(part, whole) for part in of["anyOf"]))
    if "enum" in of or "const" in of:
        return " | ".join(str(value) for value in of.get("enum", [of.get("const")]))
    if of.get("type") == "array":
        if "prefixItems" in of:
            return f"({', '.join(_kind(part, whole) for part in of['prefixItems'])})"
        return f"list of: {_kind(of['items'], whole)}"
    if "properties" in of:
        return f"mapping with {', '.join(of['properties'])}"
    if of.get("type") == "object":
        return "mapping of names to texts"
    words = {"integer": "whole number", "number": "number", "boolean": "true | false", "string": "text", "null": "null"}
    kind = "path" if of.get("format") == "path" else words[of["type"]]
    if "pattern" in of:
        return f"{kind} of the form {of['pattern'].strip('^$')}"
    return kind + _range(of)


def _range(of: dict[str, Any]) -> str:
    bounds = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    words = [f"{word} {of[name]}" for name, word in bounds if name in of and of[name] != LARGEST]
    return f" {' '.join(words)}" if words else ""
