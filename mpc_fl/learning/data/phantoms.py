"""SYNTHETIC chest X-ray phantoms: the embedded default. No patient is behind them and they are no model of disease.

A phantom has the coarse look of a frontal chest film: dark lungs, ribs, a bright mediastinum and heart, random pose and
exposure. `normal` is only that; `bacterial` adds one dense focal consolidation; `viral` adds a diffuse reticular
texture in both lungs. Exposure is normalised, so mean brightness alone does not tell the classes apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.partition import generator

Split = Literal["train", "test", "public"]
_SPLIT_KEY = {"train": 10, "test": 11, "public": 12}
_CHUNK = 256
_EDGE = 0.1  # of a lung's darkness: beyond hardly anything of a diagnosis is drawn


@dataclass(frozen=True)
class Phantoms:
    """float32 images (records, height, width) in [0, 1], int64 labels and patients (records,), and where lungs lie: bool
    (records, height, width), with the soft edge in which a diagnosis still shows."""

    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    lungs: np.ndarray


def make_phantoms(patients: int, classes: int, size: int, seed: int, split: Split) -> Phantoms:
    """Phantoms of `patients` patients, classes in equal shares; about one patient in five has two images.

    Raises `DataError` for other than 2 or 3 classes.
    """
    owner, label_of, draw = _drawn_patients(patients, classes, seed, split)
    labels = label_of[owner]
    pieces = [_draw_images(labels[start : start + _CHUNK], size, draw) for start in range(0, len(labels), _CHUNK)]
    images, lungs = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Phantoms(images, labels.astype(np.int64), owner.astype(np.int64), lungs)


def phantom_labels(patients: int, classes: int, seed: int, split: Split) -> np.ndarray:
    """The class of each patient of `make_phantoms`, int64 (patients,), without drawing images. Raises `DataError`."""
    return _drawn_patients(patients, classes, seed, split)[1]


def _drawn_patients(
    patients: int, classes: int, seed: int, split: Split
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Owner of each record, class of each patient, and the generator that draws their images next."""
    if not 2 <= classes <= 3:
        raise DataError(f"phantoms have 2 or 3 classes, not {classes}", "set data.classes to two or three names")
    draw = generator(seed, _SPLIT_KEY[split])
    twice = draw.random(patients) < 0.2
    owner = np.repeat(np.arange(patients), 1 + twice)
    return owner, draw.permutation(np.arange(patients) % classes), draw


def _bell(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 inside the unit distance, 0 outside, with a soft edge."""
    return 1.0 / (1.0 + np.exp((distance - 1.0) / softness))


def _draw_images(labels: np.ndarray, size: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images, and where each one's lungs lie."""
    count = len(labels)
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")

    def each(low: float, high: float) -> np.ndarray:
        return draw.uniform(low, high, (count, 1, 1))

    x, y = (x - each(-0.08, 0.08)) / each(0.92, 1.08), (y - each(-0.08, 0.08)) / each(0.92, 1.08)
    body = _bell((x / 0.95) ** 2 + (y / 1.15) ** 2, 0.08)
    spread, height = each(0.36, 0.44), each(0.55, 0.68)
    left = _bell(((x + spread) / each(0.26, 0.32)) ** 2 + ((y + 0.05) / height) ** 2, 0.12)
    right = _bell(((x - spread) / each(0.26, 0.32)) ** 2 + ((y + 0.05) / height) ** 2, 0.12)
    lungs = np.maximum(left, right)
    spine = np.exp(-((x / each(0.10, 0.14)) ** 2))
    heart = _bell(((x - 0.14) / each(0.24, 0.32)) ** 2 + ((y - 0.28) / each(0.26, 0.34)) ** 2, 0.15)
    ribs = 0.5 + 0.5 * np.cos(2 * np.pi * (y * each(3.2, 4.0) + 0.6 * x**2 + each(0, 1)))
    film = 0.62 * body - 0.42 * lungs + 0.22 * spine + 0.24 * heart + 0.06 * ribs * body

    # bacterial: one dense, soft-edged opacity somewhere in one lung
    side = np.where(each(0, 1) < 0.5, -1.0, 1.0)
    focus = np.exp(-(((x - side * spread) / each(0.16, 0.26)) ** 2 + ((y - each(-0.35, 0.35)) / each(0.16, 0.28)) ** 2))
    film = film + np.where(labels == 1, draw.uniform(0.4, 0.6, count), 0.0)[:, None, None] * focus * np.maximum(
        lungs, 0.3
    )

    # viral: a fine net of oblique lines in both lungs
    frequency = each(4.5, 6.0)
    net = np.sin(2 * np.pi * frequency * (x + y) + each(0, 6)) * np.sin(2 * np.pi * frequency * (x - y) + each(0, 6))
    film = film + np.where(labels == 2, draw.uniform(0.22, 0.34, count), 0.0)[:, None, None] * net * lungs

    film = film + draw.normal(0.0, 0.045, film.shape)
    mean = film.mean(axis=(1, 2), keepdims=True)
    deviation = film.std(axis=(1, 2), keepdims=True)
    exposure = 0.45 + each(-0.04, 0.04) + (film - mean) / deviation * each(0.17, 0.21)
    return np.clip(exposure, 0.0, 1.0).astype(np.float32), lungs > _EDGE


def public_phantoms(count: int, config: Config) -> torch.Tensor:
    """`count` phantoms that belong to no split, float32 (count, channels, size, size): public inputs for calibration."""
    size, channels = config.data.image_size, config.data.channels
    images = make_phantoms(count, 3, size, config.seed, "public").images[:count]
    return torch.from_numpy(images)[:, None].expand(-1, channels, -1, -1).contiguous()
