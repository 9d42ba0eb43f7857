"""GDCM in a process of its own, as a decoder of pydicom: damaged JPEG Lossless ends that process, not the hospital's.

Within a program GDCM aborts all of it: a single wrong byte in a file can raise an exception in C++ that Python cannot catch.
Here such a file is unreadable, and the next one gets another process. What GDCM prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.learning.data import gdcm_program
from mpc_fl.learning.data.gdcm_program import read_piece, write_piece

PLUGIN = "mpc-fl gdcm"  # the name under which pydicom has it
_SYNTAXES = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
# By `-m` Python would import from the current directory first, and that may hold files of others.
_PROGRAM = f"import sys; sys.path[:] = sys.argv[1:]; from {gdcm_program.__name__} import main; main()"
_PATIENCE = 120.0  # seconds for one frame
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, ("python-gdcm",))  # asked for by pydicom


@dataclass(frozen=True)
class Frame:
    """What GDCM must know of a frame besides its bytes, all as the header says it."""

    transfer_syntax: str
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    pixel_representation: int
    photometric_interpretation: str
    planar_configuration: int


class _Decoding:
    """A running process, for the one that started it alone: a fork of that one would read the other's answers."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def usable(self) -> bool:
        """Whether this process started it, and it lives."""
        return self.owner == os.getpid() and self.process.poll() is None

    def pixels(self, frame: Frame, content: bytes) -> bytes:
        """Decoded bytes. Raises `ValueError` for a frame that GDCM refuses, or that ends it."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None
        try:
            write_piece(requests, json.dumps(asdict(frame)).encode())
            write_piece(requests, content)
            if not select.select([answers], [], [], _PATIENCE)[0]:
                raise EOFError
            done, pixels = answers.read(1), read_piece(answers)
        except (OSError, EOFError):
            self.end()
            raise ValueError("the decoder ended at this frame") from None
        if done != b"\1":
            raise ValueError("the decoder refuses this frame")
        return pixels

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


_running: list[_Decoding] = []  # one at most; it ends with its input, when this process does


def _decoding() -> _Decoding:
    if _running and not _running[0].usable:
        _running.clear()
    if not _running:
        _running.append(_Decoding())
    return _running[0]


def register() -> None:
    """Tell pydicom of this decoder, once."""
    from pydicom.pixels import get_decoder

    for syntax in _SYNTAXES:
        decoder = get_decoder(syntax)
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, decode_frame.__name__))


def is_available(_: str) -> bool:
    """Asked by pydicom; that python-gdcm is installed was looked up before."""
    return True


def decode_frame(content: bytes, runner: Any) -> bytes:
    """Called by pydicom: the pixels of a frame. Raises `ValueError`."""
    colours = int(runner.samples_per_pixel) > 1
    frame = Frame(
        transfer_syntax=str(runner.transfer_syntax),
        rows=int(runner.rows),
        columns=int(runner.columns),
        samples=int(runner.samples_per_pixel),
        bits_allocated=int(runner.bits_allocated),
        bits_stored=int(runner.bits_stored),
        pixel_representation=int(runner.pixel_representation),
        photometric_interpretation=str(runner.photometric_interpretation),
        planar_configuration=int(runner.planar_configuration) if colours else 0,
    )
    pixels = _decoding().pixels(frame, content)
    if len(pixels) != frame.rows * frame.columns * frame.samples * frame.bits_allocated // 8:
        raise ValueError("the decoder gives another number of pixels")
    return pixels
