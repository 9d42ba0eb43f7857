"""How like an image another one is, and whether a reconstruction is more like its own image than like others. Pure.

**Similarity** is the correlation of pixels, after brightness, contrast and whatever all such images have in common have been
taken off: of both images what is left beside their best fit by a constant and the mean of public images of the kind. 1 is the
image itself, and another one has 0 on average; a picture of the chest in general counts nothing.

**At chance.** If a reconstruction shows nothing of its image, then that one takes any place alike among its own and n others by
similarity. Of m reconstructions the mean place says so all together, with a p-value.
"""

from __future__ import annotations

import math

import torch

_NOTHING = 1e-6  # length of what rounding leaves of an image that has nothing beside what all have


def similarities(found: torch.Tensor, images: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Of each of `found` (n, C, H, W) with each of `images` (m, C, H, W), float64 (n, m) in [-1, 1].

    `common` is the mean of public images, (C, H, W). Of an image with nothing beside it the similarity is 0.
    """
    shared = torch.stack([torch.ones_like(common), common]).double().reshape(2, -1).T
    basis, _ = torch.linalg.qr(shared)

    def own(of: torch.Tensor) -> torch.Tensor:
        flat = of.double().reshape(len(of), -1)
        return torch.nn.functional.normalize(flat - (flat @ basis) @ basis.T, dim=1, eps=_NOTHING)

    return own(found) @ own(images).T


def probability_at_chance(of_pairs: torch.Tensor) -> float:
    """How probable it is that the reconstructions are as close to their own images, if they show nothing of these, or closer.

    `of_pairs` (m, n) holds similarities of m reconstructions with n images, of which reconstruction i was made for image i. By
    the normal approximation of the mean place; places are exact ranks, ties share theirs. Raises `ValueError` unless n >= m >= 1
    and n >= 2.
    """
    count, among = of_pairs.shape
    if not 1 <= count <= among or among < 2:
        raise ValueError("each reconstruction is compared with its own image and with others")
    own = of_pairs.diagonal()[:, None]
    above = (of_pairs > own).sum(1) + ((of_pairs == own).sum(1) - 1) / 2  # 0: its own image is the most similar one
    middle, variance = (among - 1) / 2, (among**2 - 1) / 12
    score = (middle - float(above.mean())) / math.sqrt(variance / count)
    return 0.5 * math.erfc(score / math.sqrt(2))
