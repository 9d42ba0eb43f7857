"""What calibration says about the risk that a value leaves its range, in probabilities for one more image.

`calibration` says what the three figures are and where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

_EULER = 0.5772156649015329


@dataclass(frozen=True)
class Range:
    """One truncated value: the largest magnitude in each calibration image, float64 (N,), and the `limit` that fits.

    As the channel with the widest range has it: others count up to twice, where their range is narrower (`rescaling`).
    """

    path: str
    limit: float
    maxima: torch.Tensor = field(repr=False)

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return float(self.maxima.max())

    @property
    def beyond_seen(self) -> float:
        """Probability that the next image has a larger magnitude here than all seen."""
        return 1 / (len(self.maxima) + 1)

    @property
    def gumbel(self) -> float:
        """Probability that an image exceeds `limit`, from a Gumbel law with the maxima's mean and deviation."""
        if len(self.maxima) < 2:
            return 1.0
        scale = float(self.maxima.std()) * math.sqrt(6) / math.pi
        if scale == 0:
            return 0.0
        place = float(self.maxima.mean()) - _EULER * scale
        return -math.expm1(-math.exp(-(self.limit - place) / scale))

    @property
    def power_law(self) -> float:
        """Probability that an image exceeds `limit`, from Hill's estimator on the largest tenth of the maxima."""
        count = len(self.maxima)
        k = max(2, count // 10)
        if count <= k:
            return 1.0
        ordered = self.maxima.sort(descending=True).values
        threshold = float(ordered[k])
        if threshold <= 0 or self.limit <= threshold:
            return 1.0
        mean = float(torch.log(ordered[:k] / threshold).mean())
        return 0.0 if mean == 0 else k / count * (self.limit / threshold) ** (-1 / mean)


@dataclass(frozen=True)
class Risk:
    """Probabilities for one image like the calibration images, summed over all layers (a union bound)."""

    images: int
    beyond_seen: float
    gumbel: float
    power_law: float
    closest: Range


@dataclass(frozen=True)
class Approach:
    """How near an image came to a limit: `fraction` 1 is out of range, `path` names the layer, `image` its number."""

    path: str
    image: int
    fraction: float
