"""What one party received, kept in a directory of its own, for an audit of what each party saw (`mpc-fl audit views`).

Off unless `runtime.record_messages` says so. A line of `messages.jsonl` for each message, after decryption: who sent it, under
which tag, of which type and shape. A tensor lies beside it in a safetensors file, a control message in the line. Nothing that the
party itself knew or sent is written. What left a hospital is in the records of those that received it.

The contents kept are bounded; messages beyond are counted in their line alone, and lines are bounded too. All is for this user
alone, as whatever a party writes.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mpc_fl.errors import DataError
from mpc_fl.files import append_json_line, read_json_lines, write_text, written_whole
from mpc_fl.links.frames import Frame, Kind

log = logging.getLogger(__name__)

MESSAGES_DIRECTORY, _LINES, _CONTENT = "messages", "messages.jsonl", "content"
_MOST_LINES = 200_000
_MOST_BESIDE = 4096  # bytes of a file beside its tensor
_FILE = re.compile(r"[0-9]{6,9}\.safetensors")
_DAMAGED = "make the run again with runtime.record_messages=true"


class MessageRecord:
    """Writes down the messages that a party receives (`frames.Observer`), into `directory`; goes on with what is there.

    Of their contents at most `most_bytes` are kept.
    """

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory, self._free, self._lock = directory, most_bytes, threading.Lock()
        before = read_json_lines(directory / _LINES)
        self._count = len(before)
        self._free -= sum(line["bytes"] for line in before if line.get("kept") is True)
        if not before:
            write_text(directory / _LINES, "")

    def __call__(self, sender: str, frame: Frame) -> None:
        """Keep one message; greetings, signs of life and what is passed on for others are none. Raises `MpcFlError` when it
        cannot be written."""
        if frame.kind not in (Kind.TENSOR, Kind.OBJECT):
            return
        with self._lock:
            if self._count == _MOST_LINES:
                log.warning("%d messages are recorded, no further ones will be", _MOST_LINES)
            number, self._count = self._count, self._count + 1
            if number >= _MOST_LINES:
                return
            kept = frame.size <= self._free
            self._free -= frame.size if kept else 0
            said: dict[str, Any] = {
                "number": number,
                "sender": sender,
                "tag": frame.tag,
                "bytes": frame.size,
                "kept": kept,
            }
            if isinstance(frame.payload, torch.Tensor):
                said |= {"dtype": str(frame.payload.dtype).removeprefix("torch."), "shape": list(frame.payload.shape)}
                if kept:
                    said["file"] = f"{number:06d}.safetensors"
                    with written_whole(self._directory / said["file"]) as temporary:
                        temporary.write_bytes(save({_CONTENT: frame.payload.contiguous()}))
            elif kept:
                said["value"] = frame.payload
            append_json_line(self._directory / _LINES, said)


@dataclass(frozen=True)
class RecordedMessage:
    """One message that a party received: `dtype` and `shape` of a tensor, None of a control message. `size` in bytes.

    `file` is where its content lies, None where it was not kept.
    """

    sender: str
    tag: str
    size: int
    dtype: str | None
    shape: tuple[int, ...] | None
    file: Path | None

    def tensor(self) -> torch.Tensor:
        """Its content. Raises `DataError` where that is not there, or not what was recorded."""
        if self.file is None:
            raise DataError(f"the message '{self.tag}' of {self.sender} was not kept", "raise runtime.recorded_bytes")
        try:
            # An audit may read what others have put together: no pipe or device, and nothing that is larger than it says.
            if not self.file.is_file() or self.file.stat().st_size > self.size + _MOST_BESIDE:
                raise ValueError
            tensor = load(self.file.read_bytes())[_CONTENT]
        except (OSError, SafetensorError, KeyError, ValueError):
            raise DataError(f"{self.file} cannot be read", _DAMAGED) from None
        if tuple(tensor.shape) != self.shape or str(tensor.dtype) != f"torch.{self.dtype}":
            raise DataError(f"{self.file} holds another tensor than was recorded", _DAMAGED)
        return tensor


def is_recorded(party: Path) -> bool:
    """Whether the directory of a party holds a record."""
    return (party / MESSAGES_DIRECTORY / _LINES).is_file()


def recorded_messages(party: Path) -> Iterator[RecordedMessage]:
    """What the party with this directory received, in order. Raises `DataError` for a damaged record."""
    directory = party / MESSAGES_DIRECTORY
    for line in read_json_lines(directory / _LINES):
        try:
            yield _message(line, directory)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{directory / _LINES} holds a line that is no message", _DAMAGED) from None


def _message(line: dict[str, Any], directory: Path) -> RecordedMessage:
    sender, tag, size, dtype, shape, file = (
        line["sender"], line["tag"], line["bytes"], line.get("dtype"), line.get("shape"), line.get("file"),
    )  # fmt: skip
    texts, whole = (sender, tag, *([] if dtype is None else [dtype])), [size, *(shape or ())]
    if not all(isinstance(text, str) for text in texts) or not all(
        type(count) is int and count >= 0 for count in whole
    ):
        raise ValueError
    if (dtype is None) != (shape is None) or (file is not None and not _FILE.fullmatch(file)):
        raise ValueError
    place = None if file is None else directory / file
    return RecordedMessage(sender, tag, size, dtype, None if shape is None else tuple(shape), place)
