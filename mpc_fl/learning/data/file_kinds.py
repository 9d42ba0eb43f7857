"""What kind of file something is: from its first bytes, and from its name only where these say nothing.

Exports of hospital archives are named by number or identifier (`IM0001`, `1.2.840.10008.7`, `scan.ima`), and older ones
are DICOM without the mark that PS3.10 puts at byte 128, so a suffix is no proof of anything.
"""

from __future__ import annotations

import struct
from pathlib import Path

from mpc_fl.errors import DataError

DICOM, NIFTI = "DICOM", "NIfTI"
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "WebP", "JPEG 2000")
IMAGE_KINDS = (DICOM, *PICTURES, NIFTI)
_SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WebP",
    ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".j2c": "JPEG 2000", ".dcm": DICOM, ".dicom": DICOM, ".nii": NIFTI,
}  # fmt: skip
_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"GIF8": "GIF",
}  # fmt: skip
_HEAD = 352  # bytes that are looked at: the header of NIfTI-1 is as long
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_VALUE_REPRESENTATIONS = frozenset(
    [
        *("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "OB", "OW"),
        *("PN", "SH", "SL", "SQ", "SS", "ST", "TM", "UI", "UL", "UN", "US", "UT"),
    ]
)
_LONGEST_FIRST_ELEMENT = 1024  # of a data set without explicit VR: a length of group, a character set, an image type


class UnreadableImageError(DataError):
    """One file cannot be read as an image. Loaders skip and count it."""


def unreadable(path: Path, why: str, fix: str = "replace or remove the file") -> UnreadableImageError:
    """The error of one file."""
    return UnreadableImageError(f"cannot read image {path}: {why}", fix)


def kind_by_name(path: Path) -> str | None:
    """The kind of image that a suffix announces; None for any other suffix and for none."""
    if path.name.lower().endswith(".nii.gz"):
        return NIFTI
    return _SUFFIXES.get(path.suffix.lower())


def kind_of(path: Path) -> str | None:
    """The kind of a file by its first bytes, else by its name; None where neither says anything.

    Raises `UnreadableImageError` for a file that cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        if path.is_symlink():
            raise unreadable(path, "it is a link to what is not there", "bring that back, or remove the link") from None
        raise unreadable(path, "it is not there any more", "run again when nobody writes there") from None
    except OSError as error:
        raise unreadable(path, error.strerror or "no access", "check its permissions") from None
    return _kind_of_bytes(head) or kind_by_name(path)


def has_dicom_mark(head: bytes) -> bool:
    """Whether a file that begins so has the mark of PS3.10."""
    return head[128:132] == b"DICM"


def _kind_of_bytes(head: bytes) -> str | None:
    if has_dicom_mark(head):
        return DICOM
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and len(head) >= 18 and struct.unpack("<I", head[14:18])[0] in _BMP_HEADERS:
        return "BMP"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return NIFTI
    return DICOM if _begins_with_an_element(head) else None


def _begins_with_an_element(head: bytes) -> bool:
    """Whether a data set begins without preamble: an element of group 0002 or 0008 with a plausible length or VR."""
    if len(head) < 16:
        return False
    explicit = head[4:6].decode("latin-1") in _VALUE_REPRESENTATIONS
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        if group in (2, 8) and element <= 0x70 and (explicit or (length <= _LONGEST_FIRST_ELEMENT and order == "<")):
            return True
    return False
