"""Writing files so that nothing half-written is ever seen, and, where it must be, so that a crash takes nothing back.

A file is written under a temporary name in the same directory and renamed (`written_whole`); JSON lines are appended, and a
last line that a crash cut off counts as none. `to_disk` is the one place that waits for the disk. What a party writes is for its
own user alone (`OTHERS_MAY_NOTHING`), unless a public file asks for more.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mpc_fl.errors import DataError
from mpc_fl.exhaustion import unwritable
from mpc_fl.parsing import parse_json_lines

_RESTORE = "restore it, or start anew in another directory"
OTHERS_MAY_NOTHING = 0o077  # the umask of every command and of every party: files 0600, directories 0700


def to_disk(written: IO[Any] | Path) -> None:
    """Have what was written to an open file, or to a file or folder by its path, on the disk when this returns.

    What a crash of the machine (not of the process alone) can leave without it: a file that was written and renamed may be
    empty or half-written under its new name, so a file goes to the disk before its rename. A rename, a new file or a
    removal may be undone, so its folder goes to the disk after it; until then either state can come back. Appended lines
    may be missing or cut off; those before the last call are whole. Raises `OSError`.
    """
    if not isinstance(written, Path):
        written.flush()
        os.fsync(written.fileno())
        return
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_whole(path: Path, mode: int = 0o600, durable: bool = False, once: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it when the block succeeds, remove it when it fails.

    Readers see the old file or the new one, never a part. With `durable` the new one is on the disk in the end, and a
    crash of the machine at any moment leaves one of the two (`to_disk`). With `once` a file that another process put
    there meanwhile stays, and the new one is dropped. Raises `MpcFlError` when it cannot be written.
    """
    import tempfile  # with what it imports itself, the help of the command line need not wait for it

    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, mode)
        if durable:
            to_disk(temporary)
        if once:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)
        if durable:
            to_disk(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. NaN becomes null, so that every reader accepts the file."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line; it survives the end of this process (and, after `to_disk(path)`, of the machine).

    Raises `MpcFlError` when it cannot be written; then a part of it may be there, which counts as none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(value), allow_nan=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON lines file; a missing file has none. A last line without end, cut off by a crash, is none.

    Raises `DataError` when the file cannot be read, or a line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from None
    try:
        lines = parse_json_lines(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}", _RESTORE) from None
    if not all(isinstance(line, dict) for line in lines):
        raise DataError(f"{path} is damaged: not every line is a JSON object", _RESTORE)
    return lines


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
