"""Standard output and standard error as a user may leave them: closed, a pipe that nobody reads any more, a full disk.

What nobody reads is dropped: the exit status tells how the command ended, whoever looks at its output (`mpc-fl ... | head -1`,
`>&-`). Where output was to be kept and cannot be, as on a full disk, that is an error of the command; on standard error it cannot
be told.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from mpc_fl.errors import MpcFlError

_DESCRIPTORS = (0, 1, 2)
_OUTPUT = 1


class _Written(io.FileIO):
    """A descriptor to write to. The first write that fails ends all: an error if it says so, silence from then on."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if not self._lost:
            try:
                written = super().write(data)
                return size if written is None else written
            except BrokenPipeError:
                self._lost = True
            except OSError as error:
                self._lost = True
                if self.fileno() == _OUTPUT:
                    raise MpcFlError(
                        f"standard output cannot be written: {error.strerror}", "send it to another place"
                    ) from None
        return size


def open_standard_streams() -> None:
    """At the start of a command, before it opens anything: the first descriptors lead somewhere, and writing is as said above.

    A descriptor that is closed would otherwise be that of the next file that is opened, and get what is meant for a terminal.
    """
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - it lasts as long as the process
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):  # a test has put another there
            setattr(sys, name, _text_stream(stream, descriptor))


def _text_stream(before: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    """In the encoding of before; names of files may hold what that does not have."""
    encoding = "utf-8" if before is None else before.encoding
    if before is not None:
        before.flush()
    buffered = io.BufferedWriter(_Written(descriptor))
    return io.TextIOWrapper(
        buffered, encoding, "backslashreplace", line_buffering=os.isatty(descriptor) or descriptor == 2
    )


def flush_output() -> None:
    """Have all that was said on its way. Raises `MpcFlError` where standard output cannot take it."""
    with contextlib.suppress(ValueError):  # it was closed
        sys.stdout.flush()
