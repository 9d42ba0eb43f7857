"""Small DICOM files with identifying tags, as tests write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian


def write_dicom(
    path: Path, pixels: np.ndarray, *, syntax: Any = ExplicitVRLittleEndian, bits: int = 8, **tags: Any
) -> Path:
    """A small DICOM file with identifying tags; `tags` replace the defaults, None removes an element."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(
        str(path), {}, b"\0" * 128, meta, syntax.is_implicit_VR, is_little_endian=syntax.is_little_endian
    )
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Mustermann^Erika", "GEHEIM-4711", "19610412"
    dataset.InstitutionName = "Klinik am See"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 if pixels.dtype.itemsize == 1 else 16
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = 1 if pixels.dtype.kind == "i" else 0
    data = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    tags.setdefault("PixelData", data)
    for name, value in tags.items():
        if value is None:
            dataset.pop(name, None)
        else:
            setattr(dataset, name, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
        dataset["PixelData"].is_undefined_length = syntax.is_encapsulated
    dataset.save_as(path, enforce_file_format=True)
    return path


def lookup_table(entries: list[int] | bytes, first: int, depth: int, count: int | None = None) -> pydicom.Sequence:
    """A sequence with one lookup table, of entries or of their bytes."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) if count is None else count, first, depth])
    item.add_new("LUTData", "OW" if isinstance(entries, bytes) else "US", entries)
    return pydicom.Sequence([item])
