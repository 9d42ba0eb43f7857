"""Augmented copies of images: a patient's gradient is the mean over K of them, taken before it is clipped (De et al., 2022).

Each copy is turned, shifted, scaled, perhaps mirrored, and changed in contrast, all at random. Clipping bounds the mean over a
patient's copies as it bounds one gradient: one patient still moves a sum by at most the clipping norm, whatever K is.

What is drawn for a record depends on the seed, the round, the step and the record's own content, and on nobody else in the
batch or in the data set. So it is with the copies themselves, bit for bit: each record's are computed by themselves, in memory
of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import grid_sample

from mpc_fl.config.training import AugmentationSection
from mpc_fl.crypto.stream_cipher import Seed

_NUMBERS = 6  # drawn for each copy: mirror, two shifts, angle, scale, contrast
_CONSTANTS = 7  # of a transformation: a map of the plane, 2 x 3, row by row, and the contrast


@dataclass(frozen=True)
class AugmentedRecords:
    """Images float32 (N, C, H, W) and, for K copies of each, transformations float32 (N, K, 7), not yet carried out."""

    records: torch.Tensor
    transformations: torch.Tensor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: slice | torch.Tensor) -> AugmentedRecords:
        return AugmentedRecords(self.records[rows], self.transformations[rows])

    def tensor_split(self, parts: int) -> list[AugmentedRecords]:
        """In so many parts of nearly the same size, as `torch.Tensor.tensor_split`."""
        pairs = zip(self.records.tensor_split(parts), self.transformations.tensor_split(parts), strict=True)
        return [AugmentedRecords(*pair) for pair in pairs]


Inputs = torch.Tensor | AugmentedRecords


def records_of(inputs: Inputs) -> torch.Tensor:
    """The records themselves, float32 (N, ...)."""
    return inputs.records if isinstance(inputs, AugmentedRecords) else inputs


def copies_per_record(inputs: Inputs) -> int:
    """K; 1 for records as they are."""
    return inputs.transformations.shape[1] if isinstance(inputs, AugmentedRecords) else 1


def copies_of(inputs: Inputs) -> torch.Tensor:
    """All copies of each record, float32 (N, K, ...); the records as they are, with K = 1, where nothing is augmented."""
    if isinstance(inputs, AugmentedRecords):
        return transformed(inputs.records, inputs.transformations)
    return inputs.unsqueeze(1)


def augmented(settings: AugmentationSection, records: torch.Tensor, seed: Seed) -> Inputs:
    """`settings.copies` random copies of each of the images float32 (N, C, H, W); the records as they are without augmentation.

    `seed` is fresh for every step of a round. Draws nothing, and leaves it unused, without augmentation.
    """
    if not settings.varies:
        return records
    return AugmentedRecords(records, draw_transformations(settings, records, seed))


def record_digest(record: torch.Tensor) -> bytes:
    """Of a record's content alone, 8 bytes: the same wherever it occurs."""
    return hashlib.blake2b(record.contiguous().numpy().tobytes(), digest_size=8).digest()


def draw_transformations(settings: AugmentationSection, records: torch.Tensor, seed: Seed) -> torch.Tensor:
    """Transformations float32 (N, K, 7) for images float32 (N, C, H, W), from a stream of `seed` for each content of a record."""
    known: dict[bytes, torch.Tensor] = {}  # two records of one content, perhaps of two patients, have the same copies
    drawn = []
    for record in records:
        digest = record_digest(record)
        if digest not in known:
            known[digest] = _transformations(
                settings, seed.stream("copies", digest.hex()).uniform(_NUMBERS * settings.copies)
            )
        drawn.append(known[digest])
    return torch.stack(drawn) if drawn else torch.empty(0, settings.copies, _CONSTANTS)


def unchanged(records: int, copies: int) -> torch.Tensor:
    """Transformations float32 (N, K, 7) that leave images as they are."""
    return torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]).expand(records, copies, _CONSTANTS)


def _transformations(settings: AugmentationSection, uniform: np.ndarray) -> torch.Tensor:
    """Float32 (K, 7) from K * 6 numbers in (0, 1]. The map leads from a place in the copy to one in the image."""
    constants = []
    for mirror, *rest in uniform.reshape(_NUMBERS, settings.copies).T.tolist():
        across, down, angle, scale, contrast = (2 * part - 1 for part in rest)  # in (-1, 1]
        sign, angle = -1.0 if settings.flip and mirror <= 0.5 else 1.0, angle * math.radians(settings.rotation)
        inverse = 1 / (1 + scale * settings.scale)
        cosine, sine = inverse * math.cos(angle), inverse * math.sin(angle)
        # `grid_sample` has coordinates from -1 to 1: a side is 2 long.
        plane = sign * cosine, -sine, 2 * across * settings.shift, sign * sine, cosine, 2 * down * settings.shift
        constants.append([*plane, 1 + contrast * settings.contrast])
    return torch.tensor(constants)


def transformed(records: torch.Tensor, transformations: torch.Tensor) -> torch.Tensor:
    """Copies float32 (N, K, C, H, W) of images float32 (N, C, H, W) by transformations float32 (N, K, 7).

    Bilinear; beyond an image's border its border goes on. Contrast spreads values about the mean of the copy; they are not cut off,
    because normalised images have no range.
    """
    images = records.new_empty(len(records), transformations.shape[1], *records.shape[1:])
    means = records.new_empty(*transformations.shape[:2], 1, 1, 1)
    for record, places, copies, mean in zip(
        records, _places(transformations, records.shape[2:]), images, means, strict=True
    ):
        # By itself, in memory of its own: by how many there are, these two might round differently.
        drawn = grid_sample(
            record.clone().expand_as(copies),
            places.clone(),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        copies.copy_(drawn)
        mean.copy_(drawn.mean(dim=(1, 2, 3), keepdim=True))
    # What follows treats each number by itself.
    return images.sub_(means).mul_(transformations[:, :, 6].reshape(means.shape)).add_(means)


def _places(transformations: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Where each pixel of a copy lies in its image, float32 (N, K, H, W, 2). Angles are true for square images, which all sources
    give."""
    # By sums and products of single elements: a matrix product might round differently by its size.
    down, across = ((2 * torch.arange(side) + 1) / side - 1 for side in sides)
    rows = transformations[:, :, :6].unflatten(2, (2, 3))[..., None, None].unbind(2)
    places = [row[:, :, 0] * across + row[:, :, 1] * down[:, None] + row[:, :, 2] for row in rows]
    return torch.stack(places, dim=-1)
