"""The versions of the reveal ledger, and the one text of each that its digests and signatures are over.

Version 2 adds to a block its `version`, to the members the `quorum`, to an opening its `transcript`; a block of it counts only
with the signatures of a quorum of hospitals (`ledger_audit.shortfalls`). A ledger of version 1 is read, verified and shown as
what it was and not continued. A block of version 1 has no field that says so, so none can be taken for one of version 2:
digests and signatures name the format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Any

VERSION = 2
FORMATS = {1: "mpc-fl reveal ledger 1", 2: "mpc-fl reveal ledger 2"}
# Fields that a version does not know, by name: in version 1 no class of the ledger had another field of this name.
_UNKNOWN = {1: frozenset({"version", "quorum", "transcript"}), 2: frozenset[str]()}


def fields_of(kind: type, version: int) -> set[str]:
    """The names of the fields that an object of this dataclass has in a version."""
    return {field.name for field in dataclasses.fields(kind)} - _UNKNOWN[version]


def content_of(item: Any, version: int, without: Collection[str] = ()) -> dict[str, Any]:
    """A dataclass object as what is written of it in a version, but for the fields in `without`."""
    return {name: getattr(item, name) for name in fields_of(type(item), version) if name not in without}


def canonical(value: Any, version: int) -> bytes:
    """JSON in the one form that the ledger accepts; dataclass objects are written as `content_of`."""

    def written(item: Any) -> dict[str, Any]:
        return content_of(item, version)

    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=written).encode("ascii")


def sha256(kind: str, value: Any, version: int) -> str:
    """SHA-256, as hex, of a value of one kind in one version: no digest of one is a digest of another."""
    return hashlib.sha256(canonical([FORMATS[version], kind, value], version)).hexdigest()


def version_of(block: Any) -> int:
    """The version that a block from JSON says it is of. Raises `ValueError` for one that is not known."""
    if not isinstance(block, dict) or "version" not in block:
        return 1
    if type(block["version"]) is not int or block["version"] != VERSION:
        raise ValueError("no version that is known")
    return VERSION
