"""The noise of DP-SGD, drawn from the project's stream cipher, within Opacus's optimizer.

Importing this module imports Opacus, which takes seconds: `dp_sgd` does so when it trains privately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.errors import PrivacyBudgetError

_GAUSSIANS_PER_VALUE = 4


def gaussian_noise(stream: Stream, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float64 noise of this shape.

    Each value is the sum of four independent draws, halved: the gaps between the floating-point values one Box-Muller
    draw can take would betray the sum underneath (Mironov, CCS 2012), inverting four takes 2^159 trials (Holohan and
    Braghin, ESORICS 2021, section 5.1, as in Opacus's secure mode). About 0.1 s per million values.
    """
    total = stream.gaussian(shape)
    for _ in range(_GAUSSIANS_PER_VALUE - 1):
        total += stream.gaussian(shape)
    return total / _GAUSSIANS_PER_VALUE**0.5


class StreamNoiseOptimizer(DPOptimizer):
    """Opacus's DP-SGD optimizer with the project's noise, for gradients that are already clipped and summed.

    `accumulate` hands over a clipped sum; `step` adds noise of standard deviation `noise_multiplier * clipping_norm`
    (float64, one stream per parameter), divides by `expected_batch_size`, and steps. `noise_stream(index)` must
    give a fresh stream for every step and parameter. A sum is used once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clipping_norm: float,
        expected_batch_size: float,
        noise_stream: Callable[[int], Stream],
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch_size,
        )
        self._noise_stream = noise_stream

    def accumulate(self, sums: Sequence[torch.Tensor]) -> None:
        """Take the clipped sum of this step, one tensor per parameter."""
        for parameter, total in zip(self.params, sums, strict=True):
            parameter.summed_grad = total.to(parameter.device)  # of a GPU, where gradients may have been computed

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        """Opacus asks whether there is anything to do; the per-sample gradients themselves are gone by now."""
        return [parameter.summed_grad for parameter in self.params]

    @property
    def accumulated_iterations(self) -> int:
        """One clipped sum per step."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Done by `clipped_sum`."""

    def add_noise(self) -> None:
        """p.grad = clipped sum + noise, added in float64 before the one rounding to float32."""
        scale = self.noise_multiplier * self.max_grad_norm
        for index, parameter in enumerate(self.params):
            if parameter.summed_grad is None:
                raise PrivacyBudgetError("a step without a clipped sum", "call accumulate before every step")
            noise = gaussian_noise(self._noise_stream(index), parameter.shape)
            parameter.grad = (parameter.summed_grad.double() + scale * noise).to(parameter.dtype)
            parameter.summed_grad = None
