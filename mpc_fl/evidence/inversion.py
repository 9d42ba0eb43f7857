"""Gradient inversion: an image looked for whose gradient points where an update that was seen points. An attack, no bound. Pure.

Geiping, Bauermeister, Dröge, Moeller, *Inverting Gradients* (NeurIPS 2020): of images x in [0, 1] the one is searched that makes

    1 - cosine(gradient of the loss at x, what was seen) + weight * total variation of x

small, by Adam along the sign of the gradient, with a rate that falls by ten after 3/8, 5/8 and 7/8 of the steps. The label is
read off first, where the last layer has an offset: with one image the gradient of its own class's offset alone is negative (Zhao,
Mopuri, Bilen, *iDLG*, 2020). Whoever attacks knows the network, its weights and how it is trained.

The start of the search is drawn from a seed: the attack is part of no protocol and keeps nobody's secret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from mpc_fl.learning.models.parameters import trainable_parameters

_FALLS = (3 / 8, 5 / 8, 7 / 8)  # of the steps, after which the rate falls
_MEAN, _DEVIATION = 0.5, 0.2  # of the pixels at which the search starts


@dataclass(frozen=True)
class Search:
    """How an image is searched: so many steps, the rate of the first, the weight of the total variation, and the seed of where
    it starts."""

    steps: int = 300
    rate: float = 0.1
    variation: float = 0.3
    seed: int = 0


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute differences of neighbours, down and across, of each image (n, C, H, W): shape (n,)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
    return down + (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))


def gradients_of(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function from images (n, C, H, W) and labels int64 (n,) to the gradient of each one's loss, float32 (n, P).

    P and its order are those of `parameters.flatten_parameters`. Its results can be differentiated along the images.
    """
    values = {name: parameter.detach() for name, parameter in trainable_parameters(model)}

    def loss(of: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, of, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def flat(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = each(values, images, labels)
        return torch.cat([found[name].reshape(len(images), -1) for name in values], dim=1)

    return flat


def label_seen(model: nn.Module, seen: torch.Tensor) -> int:
    """The class of the one image whose gradient, float (P,), was seen, perhaps under noise: the lowest of the last offsets.

    Raises `ValueError` for a network whose last parameters are no offsets of classes.
    """
    name, offsets = trainable_parameters(model)[-1]
    if offsets.dim() != 1:
        raise ValueError(f"the last parameters, '{name}', are no offsets")
    return int(seen[-len(offsets) :].argmin())


def inverted(
    model: nn.Module, seen: torch.Tensor, form: tuple[int, ...], search: Search, told: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """For each of n gradients that were seen, float (n, P), an image that explains it, float32 (n, C, H, W); `form` is (C, H, W).

    A gradient counts up to its length, so an update of one step will do, as the negative of it. `told` is called after each step.
    Raises `ValueError` as `label_seen`, and where P is not that of the network.
    """
    # Directions alone matter, and words read as numbers can be too large for float32 to square.
    target = nn.functional.normalize(seen.double(), dim=1).float()
    labels = torch.tensor([label_seen(model, row) for row in target])
    gradients = gradients_of(model)
    generator = torch.Generator().manual_seed(search.seed)
    images = _MEAN + _DEVIATION * torch.randn((len(seen), *form), generator=generator)
    images = images.clamp(0, 1).requires_grad_()
    adam = torch.optim.Adam([images], lr=search.rate)
    falls = torch.optim.lr_scheduler.MultiStepLR(adam, [int(search.steps * share) for share in _FALLS], gamma=0.1)
    for _ in range(search.steps):
        found = gradients(images, labels)
        if found.shape != target.shape:
            raise ValueError(f"a gradient of {found.shape[1]} parameters was to be seen, not of {target.shape[1]}")
        distance = 1 - nn.functional.cosine_similarity(found, target, dim=1)
        (along,) = torch.autograd.grad((distance + search.variation * total_variation(images)).sum(), images)
        images.grad = along.sign()
        adam.step()
        falls.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        told()
    return images.detach()
