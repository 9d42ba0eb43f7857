"""Pictures that are not DICOM: PNG, JPEG, TIFF, BMP, WebP and JPEG 2000 through Pillow, slices of NIfTI through nibabel."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from mpc_fl.learning.data.dicom_files import COLOUR, LARGEST_PIXELS, TURNED, Frame, chosen_frame
from mpc_fl.learning.data.file_kinds import UnreadableImageError, unreadable
from mpc_fl.learning.data.quiet import MALFORMED, held_standard_error, quiet
from mpc_fl.learning.data.windows import STORED_BITS, shown_without_header

_FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "TIFF": "TIFF", "BMP": "BMP", "WebP": "WEBP", "JPEG 2000": "JPEG2000"}
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")
LARGEST_VOXELS = 1 << 28  # of a volume: 512 x 512 x 1024
_ORIENTATION = 0x0112  # of EXIF
_NIFTI_HEADER = 540  # bytes of that of NIfTI-2; that of NIfTI-1 is shorter


def read_picture(path: Path, kind: str, rule: Frame) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values in [0, 1], (height, width) or (height, width, 3), and what was done. Raises `UnreadableImageError`."""
    from PIL import Image, ImageOps

    try:
        with quiet(), held_standard_error(), Image.open(path, formats=(_FORMATS[kind],)) as file:
            if file.width * file.height > LARGEST_PIXELS:
                raise unreadable(path, "it has too many pixels", f"export at most {LARGEST_PIXELS:,}")
            frame, done = chosen_frame(path, getattr(file, "n_frames", 1), rule)
            if frame:
                file.seek(frame)
                if file.width * file.height > LARGEST_PIXELS:
                    raise unreadable(
                        path, "one of its frames has too many pixels", f"export at most {LARGEST_PIXELS:,}"
                    )
            turned = file.getexif().get(_ORIENTATION, 1) not in (0, 1)
            picture: Image.Image = ImageOps.exif_transpose(file)
            done = (*done, TURNED) if turned else done
            if picture.mode in _DEEP:
                values = np.asarray(picture)
                if not np.isfinite(values).all():
                    raise unreadable(path, "it holds values that are no numbers")
                deep, how = shown_without_header(values)
                return deep, (how, *done)
            if picture.mode in ("L", "1", "LA"):
                return np.asarray(picture.convert("L"), dtype=np.float32) / 255.0, (STORED_BITS, *done)
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0, (COLOUR, *done)
    except UnreadableImageError:
        raise
    except (*MALFORMED, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise unreadable(path, f"no valid {kind} file") from None


def read_nifti(path: Path, rule: Frame) -> tuple[np.ndarray, tuple[str, ...]]:
    """One axial slice of a volume as radiologists see it, the patient's left at the right, the front at the top."""
    if importlib.util.find_spec("nibabel") is None:
        raise unreadable(path, "a NIfTI file needs nibabel, which is not installed", "pip install 'mpc-fl[nifti]'")
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        with quiet():
            stored = _nifti_without_extensions(path)
            sizes = stored.shape
            if not 2 <= len(sizes) <= 3:
                raise unreadable(
                    path, "it is no picture and no volume of slices", "export one volume of three dimensions"
                )
            # Turning a volume unpacks all of it, in float64, and a few megabytes packed may announce any number.
            if math.prod(sizes) > LARGEST_VOXELS:
                raise unreadable(path, "it has too many voxels", f"export at most {LARGEST_VOXELS:,}")
            volume = nibabel.as_closest_canonical(stored)
            sizes = volume.shape
            if sizes[0] * sizes[1] > LARGEST_PIXELS:
                raise unreadable(path, "it has too many pixels", f"export at most {LARGEST_PIXELS:,}")
            frame, done = chosen_frame(path, sizes[2] if len(sizes) == 3 else 1, rule)
            values = np.asarray(volume.dataobj[..., frame] if len(sizes) == 3 else volume.dataobj, dtype=np.float64)
    except UnreadableImageError:
        raise
    except (*MALFORMED, ImageFileError, HeaderDataError, WrapStructError):
        raise unreadable(path, "no valid NIfTI file") from None
    if not np.isfinite(values).all() or not values.size:
        raise unreadable(path, "it holds values that are no numbers")
    picture, how = shown_without_header(values[::-1, ::-1].T)
    return picture, (how, *done)


def _nifti_without_extensions(path: Path) -> Any:
    """The volume of a file, by its header alone.

    What may stand between header and voxels says of itself how long it is, and nibabel would read it: a megabyte packed announces a
    gigabyte, and what is said there may name the patient.
    """
    import nibabel
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.openers import ImageOpener

    with ImageOpener(str(path)) as file:
        beginning = file.read(_NIFTI_HEADER)
    kind = nibabel.Nifti2Image if nibabel.Nifti2Header.may_contain_header(beginning) else nibabel.Nifti1Image
    header = kind.header_class(beginning[: kind.header_class.template_dtype.itemsize])
    return kind(ArrayProxy(str(path), header), header.get_best_affine(), header)
