"""Files appear whole or not at all, and are on the disk when it was promised."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mpc_fl import files
from mpc_fl.errors import MpcFlError
from mpc_fl.files import (
    append_json_line,
    keep_json_lines,
    read_json_lines,
    to_disk,
    write_json,
    write_text,
    written_whole,
)


class Watched:
    """Notes, in order, what goes to the disk and what is renamed, and does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, str, bytes | None]] = []
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(files.os, "fsync", self.fsync)
        monkeypatch.setattr(files.os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.done.append(("disk", path.name, path.read_bytes() if path.is_file() else None))
        self._fsync(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        self.done.append(("rename", new.name, None))
        self._replace(old, new)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_durable_file_is_on_the_disk_before_its_rename_and_its_folder_after(tmp_path: Path, watched: Watched) -> None:
    path = tmp_path / "folder" / "ledger"
    with written_whole(path, 0o600, durable=True) as temporary:
        temporary.write_bytes(b"content")
    (first, name, content), renamed, last = watched.done
    assert first == "disk" and name.startswith(".ledger.") and content == b"content"
    assert (renamed, last) == (("rename", "ledger", None), ("disk", "folder", None))
    assert path.read_bytes() == b"content" and path.stat().st_mode & 0o777 == 0o600


def test_what_is_not_durable_does_not_wait_for_the_disk(tmp_path: Path, watched: Watched) -> None:
    write_text(tmp_path / "report", "content")
    assert watched.done == [("rename", "report", None)]


def test_an_open_file_is_flushed_first(tmp_path: Path, watched: Watched) -> None:
    with (tmp_path / "log").open("w") as file:
        file.write("line\n")
        to_disk(file)
        assert watched.done == [("disk", "log", b"line\n")]


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_what_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync" if durable else "replace", full)
    with pytest.raises(MpcFlError, match="cannot write .*model: No space left on device: check the path"):
        with written_whole(tmp_path / "model", durable=durable):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_crash_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"round": 1, "loss": float("nan")})
    append_json_line(path, {"round": 2, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"round": 3, "lo')
    assert read_json_lines(path) == [{"round": 1, "loss": None}, {"round": 2, "loss": 0.5}]
    keep_json_lines(path, lambda line: line["round"] > 1)
    assert path.read_text() == '{"round": 2, "loss": 0.5}\n'


def test_json_holds_no_word_that_readers_refuse(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"a": [float("inf"), 1.0], "b": (float("-inf"), {"c": float("nan")})})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": [None, 1.0], "b": [None, {"c": None}]}
