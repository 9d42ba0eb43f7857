"""DICOM files: the pixels as they are shown on a screen, and the patient's identifier by itself.

Of a file only pixels and what is needed to show them are loaded (`_ELEMENTS`). The one identifying element that is ever read,
PatientID, is read by `patient_identifier`, which `patients` hashes with a key of the site; nothing is logged or copied.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpc_fl.learning.data.dicom_decoders import decoded
from mpc_fl.learning.data.file_kinds import UnreadableImageError, has_dicom_mark, unreadable
from mpc_fl.learning.data.quiet import MALFORMED, quiet
from mpc_fl.learning.data.spellings import plain_patient
from mpc_fl.learning.data.windows import shown, through_table

Frame = Literal["error", "first", "middle"]
LARGEST_PIXELS = 64_000_000
LARGEST_INFLATED = 256_000_000  # bytes of a deflated data set: a picture of so many pixels in 16 bits is half of it
INVERTED, PALETTE = "inverted (MONOCHROME1)", "colours by the palette in the header"
FIRST_FRAME, MIDDLE_FRAME = "first of several frames", "middle one of several frames"
TURNED = "turned as the header says"
COLOUR = "colours as they stand"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # the decoders give RGB for all of them
_PALETTE = "PALETTE COLOR"
_PRIMARIES = ("Red", "Green", "Blue")
_PALETTES = [f"{colour}PaletteColorLookupTable{part}" for colour in _PRIMARIES for part in ("Descriptor", "Data")]
# The only data elements that are loaded for a picture.
_ELEMENTS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence", "RescaleSlope",
    "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelData", "PixelPaddingValue", "PatientOrientation", *_PALETTES,
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _PRIMARIES),
)  # fmt: skip
_DAMAGED = "its header is damaged or lacks what a picture needs"
_META_BEGINS = 132  # after the preamble and its mark
_PIECE = 1 << 16  # bytes that are inflated at a time
_GROUP_LENGTH = 12  # bytes of the first element, which says how long those of group 0002 after it are


def chosen_frame(path: Path, count: int, rule: Frame) -> tuple[int, tuple[str, ...]]:
    """Which of `count` frames is taken, and how that is said. Raises `UnreadableImageError` where the rule is `error`."""
    if count == 1:
        return 0, ()
    if rule == "error":
        raise unreadable(path, f"it has {count} frames", "set data.frame to first or middle, or export one frame")
    return (0, (FIRST_FRAME,)) if rule == "first" else (count // 2, (MIDDLE_FRAME,))


def read_dicom(path: Path, rule: Frame) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values in [0, 1], (height, width) or (height, width, 3), as shown on a screen, and what was done to get there.

    Raises `UnreadableImageError` for a file that holds no picture, or one that cannot be decoded.
    """
    with quiet():
        dataset = _loaded(path, _ELEMENTS)
        try:
            if "PixelData" not in dataset:
                raise _without_pixels(dataset, path)
            return _picture(dataset, path, rule)
        except UnreadableImageError:
            raise
        except _errors():  # their messages may quote values of tags
            raise unreadable(path, _DAMAGED) from None


def _without_pixels(dataset: Any, path: Path) -> UnreadableImageError:
    """What is wrong with a file without pixels: one that says it is a picture is cut off, of a transfer that broke, say."""
    kind = dataset.file_meta.get("MediaStorageSOPClassUID")
    if "Rows" in dataset or (kind is not None and "Image Storage" in kind.name):
        return unreadable(path, "it is cut off before its pixels", "export it again, or remove it")
    return unreadable(path, "it holds no pixels (a report, a plan or an index)", "remove it from the folder")


def patient_identifier(path: Path) -> str | None:
    """PatientID, for `patients` alone; None where there is none, or the file is no readable DICOM.

    Who issued it is left aside: one scanner says so and another does not, of the same patient.
    """
    with quiet():
        try:
            dataset = _loaded(path, ("PatientID",), stop_before_pixels=True)
            return plain_patient(str(dataset.get("PatientID") or "").strip()) or None
        except UnreadableImageError:
            return None
        except _errors():  # of values that are no text
            return None


def _errors() -> tuple[type[Exception], ...]:
    """What pydicom, Pillow and damaged content raise."""
    import pydicom
    from PIL import Image

    return (
        *MALFORMED,
        pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    )  # fmt: skip


def _loaded(path: Path, elements: tuple[str, ...], stop_before_pixels: bool = False) -> Any:
    """Some elements of a file, with the transfer syntax that it says or, without the mark of PS3.10, that it is in."""
    import pydicom
    from pydicom import uid

    try:
        with path.open("rb") as file:
            marked = has_dicom_mark(file.read(132))
            file.seek(132 if marked else 0)
            # As pydicom does it: a file without the mark may have these elements, too.
            meta = pydicom.filereader._read_file_meta_info(file)
        deflated = meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
        if deflated and not marked:
            raise unreadable(path, "a deflated DICOM file without its mark is not read", "export it again")
        bare = deflated or not marked  # a data set without the mark and what follows it
        dataset = pydicom.dcmread(
            _inflated(path, int(meta.FileMetaInformationGroupLength)) if deflated else path,
            force=bare, specific_tags=list(elements), stop_before_pixels=stop_before_pixels,
        )  # fmt: skip
        if bare and not len(dataset):
            raise unreadable(path, "it is no DICOM file")
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = (
                uid.ImplicitVRLittleEndian
                if implicit
                else uid.ExplicitVRLittleEndian
                if little
                else uid.ExplicitVRBigEndian
            )
        return dataset
    except UnreadableImageError:
        raise
    except OSError as error:
        raise unreadable(path, error.strerror or "no access", "check its permissions") from None
    except _errors():
        raise unreadable(path, _DAMAGED) from None


def _inflated(path: Path, meta_length: int) -> io.BytesIO:
    """The data set of a deflated file (PS3.5 A.5), of at most `LARGEST_INFLATED` bytes: pydicom inflates without any bound."""
    inflating, content = zlib.decompressobj(-zlib.MAX_WBITS), io.BytesIO()
    with path.open("rb") as file:
        file.seek(_META_BEGINS + _GROUP_LENGTH + meta_length)
        while not inflating.eof:
            piece = inflating.unconsumed_tail or file.read(_PIECE)
            if not piece:
                raise unreadable(path, "it is deflated and damaged or cut off", "export it again, or remove it")
            content.write(inflating.decompress(piece, _PIECE))
            if content.tell() > LARGEST_INFLATED:
                what = f"it is deflated and holds more than {LARGEST_INFLATED // 10**6} MB"
                raise unreadable(path, what, "inflate it, for instance with `dcmconv +ti`")
    content.seek(0)
    return content


def _picture(dataset: Any, path: Path, rule: Frame) -> tuple[np.ndarray, tuple[str, ...]]:
    frames = int(dataset.get("NumberOfFrames") or 1)
    frame, done = chosen_frame(path, frames, rule)
    if int(dataset.Rows) * int(dataset.Columns) > LARGEST_PIXELS:
        raise unreadable(path, "it has too many pixels", f"export at most {LARGEST_PIXELS:,}")
    interpretation, bits = str(dataset.PhotometricInterpretation), int(dataset.BitsStored)
    if interpretation not in (*_GREY, *_COLOUR, _PALETTE):
        raise unreadable(path, "its photometric interpretation is not supported", "export it in grey or RGB")
    if int(dataset.get("HighBit", bits - 1)) != bits - 1:
        # forbidden since DICOM 2014c; pydicom would cut off the high bits
        raise unreadable(path, "its high bit is not supported", "export it with pixels in the low bits")
    pixels = decoded(dataset, path, frame, frames)
    if pixels.ndim != (3 if interpretation in _COLOUR else 2) or not pixels.size:
        raise unreadable(path, "its number of samples per pixel does not fit")
    picture, how = _brightness(pixels, dataset, interpretation, bits)
    if not np.isfinite(picture).all():
        raise unreadable(path, "its rescaling or window is not finite")
    if interpretation == "MONOCHROME1":
        picture, done = 1.0 - picture, (*done, INVERTED)
    upright = _upright(picture, dataset)
    return upright, (how, *done, *([] if upright is picture else [TURNED]))


def _brightness(pixels: np.ndarray, dataset: Any, interpretation: str, bits: int) -> tuple[np.ndarray, str]:
    if interpretation in _COLOUR:
        return np.clip(pixels.astype(np.float32) / float(2**bits - 1), 0.0, 1.0), COLOUR
    if interpretation == _PALETTE:
        return _colours_of_palette(pixels, dataset), PALETTE
    return shown(pixels, dataset, bits, signed=int(dataset.PixelRepresentation) == 1)


def _colours_of_palette(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Colours in [0, 1] by the palette in the header, float32 (height, width, 3).

    pydicom puts the pieces of a segmented palette together. A plain one it reads in the order of bytes of this machine, whatever
    that of the file is, and it takes entries of 8 bits that lie in words of 16 for entries of 16: nearly black pictures.
    """
    if "RedPaletteColorLookupTableData" not in dataset:
        from pydicom.pixels import apply_color_lut

        colours = np.asarray(apply_color_lut(pixels, dataset))[..., :3]
        return colours.astype(np.float32) / np.iinfo(colours.dtype).max
    descriptor, little_endian = dataset.RedPaletteColorLookupTableDescriptor, dataset.original_encoding[1]
    tables = (dataset[f"{colour}PaletteColorLookupTableData"].value for colour in _PRIMARIES)
    looked_up = [through_table(pixels, descriptor, table, little_endian) for table in tables]
    return np.stack([np.clip(entries / largest, 0.0, 1.0) for entries, largest in looked_up], axis=-1).astype(
        np.float32
    )


def _upright(picture: np.ndarray, dataset: Any) -> np.ndarray:
    """A frontal film with the patient's left at the right and feet below, a lateral one with the feet below.

    By PatientOrientation, where the header has it (PS3.3 C.7.6.1.1.1: the direction of a row, then of a column). Slices along
    the body stay as they are.
    """
    directions = dataset.get("PatientOrientation") or ()
    ends = [str(value)[:1].upper() for value in directions] if not isinstance(directions, str) else []
    if len(ends) != 2:
        return picture
    if ends[0] in ("H", "F") and ends[1] in ("L", "R", "A", "P"):
        picture, ends = picture.swapaxes(0, 1), ends[::-1]
    if ends[0] in ("L", "R", "A", "P") and ends[1] in ("H", "F"):
        picture = picture[::-1] if ends[1] == "H" else picture
        picture = picture[:, ::-1] if ends[0] == "R" else picture
    return picture
