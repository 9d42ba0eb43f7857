"""The record of what a party received: all of it and nothing else, for its own user, within its bound, and readable."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.errors import DataError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.message_record import MESSAGES_DIRECTORY, MessageRecord, is_recorded, recorded_messages

WORDS = torch.arange(6, dtype=torch.int32).reshape(2, 3)


def tensor_frame(tag: str, payload: torch.Tensor) -> Frame:
    return Frame(Kind.TENSOR, tag, 0, payload, payload.numel() * payload.element_size())


def record_in(party: Path, most_bytes: int = 1 << 20) -> MessageRecord:
    return MessageRecord(party / MESSAGES_DIRECTORY, most_bytes)


def test_messages_are_kept_as_they_came_for_this_user_alone(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record("b", tensor_frame("summand", WORDS))
    record("c", Frame(Kind.OBJECT, "ready", 1, {"keys": ["a"]}, 15))
    record("b", tensor_frame("empty", WORDS[:0]))
    first, second, third = recorded_messages(tmp_path)
    assert (first.sender, first.tag, first.size, first.dtype, first.shape) == ("b", "summand", 24, "int32", (2, 3))
    assert torch.equal(first.tensor(), WORDS) and third.tensor().shape == (0, 3)
    assert (second.sender, second.dtype, second.file) == ("c", None, None)
    lines = (tmp_path / MESSAGES_DIRECTORY / "messages.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["value"] == {"keys": ["a"]}
    for path in (tmp_path / MESSAGES_DIRECTORY).iterdir():
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.WELCOME, Kind.ALIVE, Kind.BYE, Kind.RELAY, Kind.RELAY_GREETING])
def test_what_is_no_message_to_this_party_is_not_recorded(kind: Kind, tmp_path: Path) -> None:
    payload: Any = torch.zeros(4, dtype=torch.uint8) if kind == Kind.RELAY else {"public_key": "00"}
    record_in(tmp_path)("b", Frame(kind, "", 0, payload, 4))
    assert is_recorded(tmp_path) and list(recorded_messages(tmp_path)) == []


def test_contents_beyond_the_bound_are_counted_alone_also_after_a_restart(tmp_path: Path) -> None:
    record = record_in(tmp_path, 60)
    for _ in range(2):
        record("b", tensor_frame("summand", WORDS))
    record("b", tensor_frame("large", WORDS))
    again = record_in(tmp_path, 60)
    again("b", tensor_frame("large", WORDS))
    again("b", tensor_frame("small", WORDS[:1]))
    kept = [message.file is not None for message in recorded_messages(tmp_path)]
    assert kept == [True, True, False, False, True]
    with pytest.raises(DataError, match="'large' of b was not kept"):
        list(recorded_messages(tmp_path))[2].tensor()
    assert len(list((tmp_path / MESSAGES_DIRECTORY).glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"sender": 3},
        {"bytes": -1},
        {"bytes": True},
        {"shape": [2, "3"]},
        {"dtype": None},
        {"file": "../000000.safetensors"},
        {"file": 5},
    ],
)
def test_a_damaged_line_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    record_in(tmp_path)("b", tensor_frame("summand", WORDS))
    path = tmp_path / MESSAGES_DIRECTORY / "messages.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(DataError, match="no message"):
        list(recorded_messages(tmp_path))


def test_another_content_than_was_recorded_is_refused(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record("b", tensor_frame("summand", WORDS))
    record("b", tensor_frame("summand", WORDS.long()))
    first, second = (message.file for message in recorded_messages(tmp_path))
    assert first is not None and second is not None
    second.replace(first)
    found, missing = recorded_messages(tmp_path)
    with pytest.raises(DataError, match="another tensor"):
        found.tensor()
    with pytest.raises(DataError, match="cannot be read"):
        missing.tensor()
    first.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        found.tensor()


def test_what_is_no_file_or_larger_than_it_says_is_not_read(tmp_path: Path) -> None:
    """Of a directory that others put together: a pipe would keep the reader for ever, and a device fill its memory."""
    record_in(tmp_path)("b", tensor_frame("summand", WORDS))
    (message,) = recorded_messages(tmp_path)
    assert message.file is not None
    content = message.file.read_bytes()
    message.file.unlink()
    os.mkfifo(message.file)

    def write() -> None:
        with contextlib.suppress(OSError), message.file.open("wb") as pipe:  # type: ignore[union-attr]
            pipe.write(content)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    with pytest.raises(DataError, match="cannot be read"):
        message.tensor()
    reading = os.open(message.file, os.O_RDONLY | os.O_NONBLOCK)
    writer.join(60)
    os.close(reading)
    message.file.unlink()
    message.file.write_bytes(content + bytes(1 << 20))
    with pytest.raises(DataError, match="cannot be read"):
        message.tensor()
