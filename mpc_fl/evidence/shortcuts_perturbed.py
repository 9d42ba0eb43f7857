"""Films changed on purpose, to see what a diagnosis rests on: no lungs, another film's borders or corners, another contrast. Pure.

A network that reads the disease loses it with the lungs, and keeps it when corners with letters, borders with the marks of a
cassette, or the contrast of a scanner change (DeGrave, Janizek, Lee, Nature Machine Intelligence 2021; Zech et al., PLOS Medicine
2018). Lungs are filled with one grey for all films, their mean there. Borders and corners become those of a film of another
diagnosis. Any seam costs accuracy, since no film of the training has one; so the same is done with films of the same
diagnosis: the seams are alike, and what is lost between the two is what the place said of the diagnosis.

Where lungs lie is known of phantoms. Of films it is a fixed region, the same for all (`lung_fields`): nobody draws outlines, and no
network does. It takes in the two fields of an upright frontal film, and parts of heart and diaphragm; of a film that is turned,
cropped or of a child held aslant it misses some.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mpc_fl.learning.data.phantom_shortcuts import corner_side

# What a change should do to a diagnosis: end it, leave it, or leave it though pixels everywhere change.
Kind = Literal["lungs", "places", "contrast"]
_BORDER, _MARGIN, _BLUR = 0.1, 0.04, 1 / 32  # shares of a side
_LEAST_BLUR = 0.7  # pixels: less is no blur
_DARKER = 1.4  # exponent of the brightness
_TOP, _BOTTOM = 1 / 6, 5 / 6  # the central two thirds of the height
_OUTER, _INNER = 0.08, 0.46  # of the left field, as shares of the width; the right one is its mirror


@dataclass(frozen=True)
class Films:
    """What is changed: images float32 (N, channels, side, side) in [0, 1], where lungs lie, bool (N, side, side), and the classes,
    int64 (N,)."""

    images: torch.Tensor
    lungs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Perturbation:
    """A change of films: its name, what it should do to a diagnosis, and `of` films, which gives new images of their form.

    `seams` gives images that are changed in the same places and say the same of the diagnosis as before; None where there are none.
    """

    name: str
    kind: Kind
    about: str
    of: Callable[[Films], torch.Tensor]
    seams: Callable[[Films], torch.Tensor] | None = None


def lung_fields(size: int) -> torch.Tensor:
    """The fixed region of films whose lungs nobody outlined: two fields over the central two thirds of the height, bool
    (size, size)."""
    place = (torch.arange(size) + 0.5) / size
    across = ((place > _OUTER) & (place < _INNER)) | ((place > 1 - _INNER) & (place < 1 - _OUTER))
    return ((place > _TOP) & (place < _BOTTOM))[:, None] & across[None]


def borders(size: int) -> torch.Tensor:
    """A frame of a tenth of the side all around, bool (size, size)."""
    wide = max(1, round(_BORDER * size))
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[wide : size - wide, wide : size - wide] = True
    return ~inside


def corners(size: int) -> torch.Tensor:
    """Squares of 22 % of the side in all four corners, bool (size, size)."""
    side, found = corner_side(size), torch.zeros(size, size, dtype=torch.bool)
    for rows in (slice(0, side), slice(size - side, size)):
        for columns in (slice(0, side), slice(size - side, size)):
            found[rows, columns] = True
    return found


def widened(regions: torch.Tensor) -> torch.Tensor:
    """Regions bool (N, side, side) with a margin of 4 % of the side around: edges of lungs are soft."""
    wide = max(1, round(_MARGIN * regions.shape[-1]))
    grown = torch.nn.functional.max_pool2d(regions[:, None].float(), 2 * wide + 1, stride=1, padding=wide)
    return grown[:, 0] > 0


def hidden(images: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Images with these regions, bool (N, side, side) or (side, side), in one grey: the mean of all images there."""
    where = regions.expand(len(images), *images.shape[-2:])[:, None].expand_as(images)
    if not bool(where.any()):
        return images.clone()
    return torch.where(where, images[where].double().mean().float(), images)


def replaced(films: Films, region: torch.Tensor, alike: bool) -> torch.Tensor:
    """Images whose region, bool (side, side), is that of another film with the same class (`alike`) or with another one.

    Which film is drawn at random, always the same way for the same classes. A film that has no such other keeps its own.
    """
    draw, others = torch.Generator().manual_seed(len(films.labels)), torch.arange(len(films.labels))
    for label in torch.unique(films.labels).tolist():
        rows = (films.labels == label).nonzero().flatten()
        if alike:
            order = rows[torch.randperm(len(rows), generator=draw)]
            others[order] = order.roll(1)
            continue
        donors = (films.labels != label).nonzero().flatten()
        if len(donors):
            others[rows] = donors[torch.randint(len(donors), (len(rows),), generator=draw)]
    return torch.where(region, films.images[others], films.images)


def _place(name: str, about: str, region: Callable[[int], torch.Tensor]) -> Perturbation:
    """The change that gives a film this place of one of another diagnosis."""
    return Perturbation(
        name,
        "places",
        about,
        lambda films: replaced(films, region(films.images.shape[-1]), alike=False),
        lambda films: replaced(films, region(films.images.shape[-1]), alike=True),
    )


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Images through a Gaussian whose deviation is 1/32 of the side, 0.7 pixels at least, with mirrored edges."""
    deviation = max(_LEAST_BLUR, _BLUR * images.shape[-1])
    reach = min(math.ceil(2 * deviation), images.shape[-1] - 1)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-steps.square() / (2 * deviation**2))
    kernel = (kernel / kernel.sum())[None, None, None]
    flat = images.reshape(-1, 1, *images.shape[-2:])
    for line in (kernel, kernel.transpose(2, 3)):
        pads = [reach * int(line.shape[3] > 1)] * 2 + [reach * int(line.shape[2] > 1)] * 2
        flat = torch.nn.functional.conv2d(torch.nn.functional.pad(flat, pads, mode="reflect"), line)
    return flat.reshape(images.shape).clamp(0, 1)


PERTURBATIONS = (
    Perturbation(
        "lungs masked",
        "lungs",
        "nothing of the lungs is left",
        lambda films: hidden(films.images, widened(films.lungs)),
    ),
    _place("borders replaced", "a tenth all around is that of a film of another diagnosis", borders),
    _place("corners replaced", "with marks of side, those of a film of another diagnosis", corners),
    Perturbation("darker", "contrast", f"brightness to the power of {_DARKER}", lambda films: films.images**_DARKER),
    Perturbation(
        "brighter", "contrast", f"brightness to the power of 1/{_DARKER}", lambda films: films.images ** (1 / _DARKER)
    ),
    Perturbation(
        "window inverted", "contrast", "black for white, as a wrong MONOCHROME1 does", lambda films: 1 - films.images
    ),
    Perturbation("blurred", "contrast", "a Gaussian of 1/32 of the side", lambda films: blurred(films.images)),
)
