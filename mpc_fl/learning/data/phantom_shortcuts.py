"""What `data.phantoms.shortcut` puts into the phantoms of one hospital: a mark that goes with a diagnosis, and a look of its own.

The mark is a letter L, as films bear to say which side is which, in the upper left corner. Nothing of it is drawn from the
phantoms' own random numbers, so that everything else of a phantom stays what it is without a shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.learning.data.partition import generator, place_of, places_of

CORNER_SHARE = 0.22  # of a side: within so much of a corner all of the mark lies
_STYLE_KEY = 13
_CONTRAST, _NOISE, _GREY = 0.4, 0.06, 0.45


def corner_side(size: int) -> int:
    """Pixels of the side of a corner of an image with so many pixels a side."""
    return max(2, round(CORNER_SHARE * size))


def mark_pixels(size: int) -> np.ndarray:
    """Where the mark lies, bool (size, size)."""
    side, margin, stroke = corner_side(size), size // 16, max(1, size // 24)
    first, last = min(margin, side - 2), max(side - margin, min(margin, side - 2) + 2)
    pixels = np.zeros((size, size), dtype=bool)
    pixels[first:last, first : first + stroke] = True
    pixels[last - stroke : last, first:last] = True
    return pixels


def bears_mark(patients: Sequence[str], labels: np.ndarray, rank: int, config: Config) -> np.ndarray:
    """Whether each record has the mark, bool (records,), by the names of the patients and int64 labels (records,)."""
    shortcut = config.data.phantoms.shortcut
    places = places_of(patients, "mark", config.seed)
    if shortcut.site is None:
        return np.zeros(len(places), dtype=bool)
    if rank != shortcut.site:
        return places < shortcut.elsewhere
    return places < np.where(labels == shortcut.diagnosis, shortcut.probability, 1 - shortcut.probability)


def with_shortcut(
    images: np.ndarray, labels: np.ndarray, patients: Sequence[str], names: Sequence[str], rank: int, config: Config
) -> np.ndarray:
    """Films of hospital `rank` with its look and, of those that bear it, the mark: float32 (records, channels, side, side).

    `patients` and `names` are those of the records, whose int64 `labels` are (records,). Raises `ConfigError` where the
    shortcut is that of a hospital that there is not.
    """
    shortcut, hospitals = config.data.phantoms.shortcut, config.federation.hospitals
    if shortcut.site is not None and shortcut.site >= hospitals:
        raise ConfigError(
            f"data.phantoms.shortcut.site is {shortcut.site}, and there are {hospitals} hospitals",
            f"name one by its rank, 0 to {hospitals - 1}",
        )
    films = _in_style(images, names, shortcut.style, rank / max(1, hospitals - 1), config.seed)
    marked = bears_mark(patients, labels, rank, config)
    films[marked] = np.where(mark_pixels(config.data.image_size), 1.0, films[marked])
    return films


def _in_style(images: np.ndarray, names: Sequence[str], style: float, place: float, seed: int) -> np.ndarray:
    """The look of the hospital at a place from 0 to 1 among all; a copy."""
    if not style or not len(images):
        return images.copy()
    contrast, noise = 1 + _CONTRAST * style * (2 * place - 1), _NOISE * style * place
    shape = images.shape[-2:]
    grains = np.stack([_grain(name, shape, seed) for name in names])[:, None]
    return np.clip(_GREY + contrast * (images - _GREY) + noise * grains, 0.0, 1.0).astype(np.float32)


def _grain(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise of one record, of standard deviation 1; the same in all channels, as a grey film has it."""
    return generator(seed, _STYLE_KEY, int(place_of(name, "style", seed) * 2**32)).normal(size=shape)
