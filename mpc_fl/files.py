"""Writing results so that nothing half-written is ever seen: a temporary name in the same directory, then a rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpc_fl.errors import MpcFlError


@contextlib.contextmanager
def written_whole(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it when the block succeeds, remove it when it fails."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise MpcFlError(f"cannot write {path}: {error.strerror}", "check the path and the free space") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. NaN becomes null, so that every reader accepts the file."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line and flush it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON lines file; a missing file has none. A last line without end, cut off by a crash, is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON lines file with the lines to keep, whole or not at all."""
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_json_lines(path) if keep(line)))


def finite(value: Any) -> Any:
    """The same nested value with NaN and infinities replaced by null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """A rename is on the disk only when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise MpcFlError(f"cannot write {directory}: {error.strerror}", "check the disk") from None
    finally:
        os.close(descriptor)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
