"""The program of a process of its own in which GDCM decodes: started by `gdcm_process`, it answers frames until its input ends.

Request: four bytes of length, JSON of a `gdcm_process.Frame`, four bytes of length, the compressed frame. Answer: one byte, 1
where it could be decoded, four bytes of length, the pixels. Lengths are big-endian. Imports nothing but GDCM.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import IO, Any

_PIECE = struct.Struct(">I")


def write_piece(file: IO[bytes], content: bytes) -> None:
    """Write a length and so many bytes."""
    file.write(_PIECE.pack(len(content)) + content)
    file.flush()


def read_piece(file: IO[bytes]) -> bytes:
    """Read a length and so many bytes. Raises `EOFError` at the end of the file."""
    head = file.read(_PIECE.size)
    if len(head) < _PIECE.size:
        raise EOFError
    (length,) = _PIECE.unpack(head)
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content


def decode(frame: dict[str, Any], content: bytes) -> bytes:
    """The pixels of a frame, samples of one pixel together, little-endian."""
    import gdcm

    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(content)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((frame["columns"], frame["rows"], 1))
    image.SetDataElement(element)
    interpretation = gdcm.PhotometricInterpretation.GetPIType(frame["photometric_interpretation"])
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(interpretation))
    if frame["samples"] > 1:
        image.SetPlanarConfiguration(frame["planar_configuration"])
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(frame["transfer_syntax"])))
    bits = frame["bits_stored"]
    image.SetPixelFormat(
        gdcm.PixelFormat(frame["samples"], frame["bits_allocated"], bits, bits - 1, frame["pixel_representation"])
    )
    pixels: bytes = image.GetBuffer().encode("utf-8", "surrogateescape")  # gdcm gives bytes as text
    return pixels


def main() -> None:
    """Answer until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            frame, content = json.loads(read_piece(requests)), read_piece(requests)
        except EOFError:
            return
        try:
            pixels, done = decode(frame, content), b"\1"
        except (ValueError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError):
            pixels, done = b"", b"\0"
        answers.write(done)
        write_piece(answers, pixels)


if __name__ == "__main__":
    main()
