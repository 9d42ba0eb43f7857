"""Silence while foreign code reads a file: its warnings and messages may quote what stands in the file.

Python's warnings and log lines are one part. Decoders in C write to descriptor 2 by themselves (OpenJPEG says what
is wrong with a marker), so that is held, too; the whole process writes nothing there meanwhile.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

# What readers of files raise for malformed content besides exceptions of their own, found by damaging files at random.
MALFORMED = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, SyntaxError,
    MemoryError, AssertionError, struct.error, zlib.error,
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log lines of the readers; a picture of absurd size is an error."""
    from PIL import Image  # pydicom decodes some pixels with it, too

    loggers = [logging.getLogger(name) for name in ("pydicom", "PIL", "pylibjpeg", "openjpeg", "nibabel.global")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def held_standard_error() -> Iterator[None]:
    """Descriptor 2 leads nowhere, for what decoders in C print."""
    try:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # no standard error, so nothing is printed
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
