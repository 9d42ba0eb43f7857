"""Compressed pixels of DICOM files: which decoder reads which transfer syntax, and what to do where none does.

Pillow reads JPEG of 8 bits, `python-gdcm` (Apache-2.0) in a process of its own JPEG of 12 bits and JPEG Lossless, `pyjpegls`
(MIT) JPEG-LS, `pylibjpeg-openjpeg` (MIT) JPEG 2000 and High-Throughput JPEG 2000, pydicom itself runs of bytes (RLE). For each
syntax there is one decoder, so that a file is read alike on every machine. `pylibjpeg-libjpeg` is not used: it is under the GPL.
"""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpc_fl.learning.data import gdcm_process
from mpc_fl.learning.data.file_kinds import UnreadableImageError, unreadable
from mpc_fl.learning.data.quiet import MALFORMED, held_standard_error

_EXTENDED = "1.2.840.10008.1.2.4.51"
_CONVERT = "convert it, for instance with `gdcmconv --raw` or `dcmdjpeg`"


@dataclass(frozen=True)
class _Decoder:
    """A decoder by the name that pydicom has for it, the module that must be there, and what is installed for it."""

    plugin: str
    module: str
    package: str


_PILLOW = _Decoder("pillow", "PIL", "pillow")
_GDCM = _Decoder(gdcm_process.PLUGIN, "gdcm", "python-gdcm")
_JPEGLS = _Decoder("pyjpegls", "jpeg_ls", "pyjpegls")
_OPENJPEG = _Decoder("pylibjpeg", "openjpeg", "'pylibjpeg[openjpeg]'")
_RUN_LENGTHS = "1.2.840.10008.1.2.5"
_DECODERS = {
    "1.2.840.10008.1.2.4.50": _PILLOW,
    _EXTENDED: _PILLOW,  # of 12 bits python-gdcm
    "1.2.840.10008.1.2.4.57": _GDCM,
    "1.2.840.10008.1.2.4.70": _GDCM,
    "1.2.840.10008.1.2.4.80": _JPEGLS,
    "1.2.840.10008.1.2.4.81": _JPEGLS,
    "1.2.840.10008.1.2.4.90": _OPENJPEG,
    "1.2.840.10008.1.2.4.91": _OPENJPEG,
    "1.2.840.10008.1.2.4.201": _OPENJPEG,
    "1.2.840.10008.1.2.4.202": _OPENJPEG,
    "1.2.840.10008.1.2.4.203": _OPENJPEG,
    _RUN_LENGTHS: _Decoder("pydicom", "pydicom", "pydicom"),
}


def decoded(dataset: Any, path: Path, frame: int, frames: int) -> np.ndarray:
    """One frame of a DICOM data set, (rows, columns) or (rows, columns, 3) in RGB, as stored.

    Raises `UnreadableImageError` that says what to install or to do where the pixels cannot be decoded.
    """
    from pydicom.pixels import pixel_array
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    native = syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
    decoder = None if native else _decoder_of(syntax, int(dataset.BitsStored), path)
    try:
        if decoder is None:
            return np.asarray(pixel_array(dataset, index=frame))
        with held_standard_error():
            if syntax != _RUN_LENGTHS:  # as many bytes as the header says, whatever is in it
                _require_announced_size(dataset, path, frame, frames)
            if decoder is _GDCM:
                gdcm_process.register()
            return np.asarray(pixel_array(dataset, index=frame, decoding_plugin=decoder.plugin))
    except UnreadableImageError:
        raise
    except MALFORMED:  # messages may quote values of tags
        how = "" if native else f" in {syntax.name}"
        raise unreadable(path, f"its pixels{how} are damaged or cut off", "export it again, or remove it") from None


def _decoder_of(syntax: Any, bits: int, path: Path) -> _Decoder:
    decoder = _DECODERS.get(str(syntax))
    if decoder is None:
        name = "an unknown transfer syntax" if syntax.is_private or syntax.name == str(syntax) else syntax.name
        raise unreadable(path, f"no decoder reads its transfer syntax, {name} ({syntax})", _CONVERT)
    if syntax == _EXTENDED and bits > 8:
        decoder = _GDCM
    if importlib.util.find_spec(decoder.module) is None:
        raise unreadable(
            path,
            f"its transfer syntax, {syntax.name} ({syntax}), needs a decoder that is not installed",
            f"pip install {decoder.package}",
        )
    return decoder


def _require_announced_size(dataset: Any, path: Path, frame: int, frames: int) -> None:
    """Refuse a compressed picture that is larger than its header says, before a decoder makes room for it."""
    from pydicom.encaps import get_frame

    announced = _codestream_size(get_frame(dataset.PixelData, frame, number_of_frames=frames))
    if announced != (int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel)):
        raise unreadable(path, "its compressed picture has another size than its header says", "export it again")


def _codestream_size(content: bytes) -> tuple[int, int, int] | None:
    """Width, height and samples of a pixel that a JPEG, JPEG-LS or JPEG 2000 codestream announces; None where it is none."""
    beginning = _codestream_in_boxes(content) if content[4:8] == b"jP  " else 0
    if content[beginning : beginning + 4] == b"\xff\x4f\xff\x51" and len(content) >= beginning + 42:
        right, bottom, left, top = struct.unpack(">IIII", content[beginning + 8 : beginning + 24])
        (samples,) = struct.unpack(">H", content[beginning + 40 : beginning + 42])
        return right - left, bottom - top, samples
    place = 2
    while content[:2] == b"\xff\xd8" and place + 10 <= len(content) and content[place] == 0xFF:
        if content[place + 1] == 0xFF:  # before a marker there may be any number of them
            place += 1
            continue
        marker, length = content[place + 1], struct.unpack(">H", content[place + 2 : place + 4])[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width, samples = struct.unpack(">HHB", content[place + 5 : place + 10])
            return width, height, samples
        place += 2 + length
    return None


def _codestream_in_boxes(content: bytes) -> int:
    """Where the codestream of a JP2 file begins (ISO 15444-1, annex I: boxes of four bytes of length and four of type); its end
    where there is none."""
    place = 0
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind == b"jp2c":
            return place + (16 if length == 1 else 8)
        if length < 8:
            break
        place += length
    return len(content)
