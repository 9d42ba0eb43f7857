"""A mean of global models instead of the last one: noise of single steps averages out.

Of the last ones with equal weights (Polyak and Juditsky, 1992), or of all with weights that fall back into the past, an exponential
moving average. The aggregator takes it of models that are opened anyway, so it costs no privacy (post-processing) and no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError


class GlobalAverage(Protocol):
    """Takes every global model, float32 (S,), and says which one is to be sent: itself, or at the last position a mean.

    A run has positions 0 to `models` - 1. Where a round is made anew its positions come again, and those models count as well.
    """

    def take(self, parameters: torch.Tensor, position: int) -> torch.Tensor:
        """What is sent after the sum at `position`, float32 (S,)."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps; empty before the first model counts."""

    def load_state(self, state: Mapping[str, torch.Tensor], size: int) -> None:
        """Go on where `state` was taken, for S = `size`. Raises `ModelError` for what cannot be such a state."""


class IterateAverage:
    """The mean of all models taken from position `models` - `last` on; None for `last`: no mean is taken."""

    def __init__(self, last: int | None, models: int) -> None:
        self._begin, self._end = models - (last or 1), models - 1
        self._averages = last is not None and last > 1
        self._sum: torch.Tensor | None = None
        self._count = 0

    def take(self, parameters: torch.Tensor, position: int) -> torch.Tensor:
        """See `GlobalAverage.take`."""
        if not self._averages or position < self._begin:
            return parameters
        self._sum = parameters.double() if self._sum is None else self._sum + parameters
        self._count += 1
        return parameters if position < self._end else (self._sum / self._count).float()

    def state(self) -> dict[str, torch.Tensor]:
        """The sum, float64 (S,), and of how many; see `GlobalAverage.state`."""
        return _state("sum", self._sum, self._count)

    def load_state(self, state: Mapping[str, torch.Tensor], size: int) -> None:
        """See `GlobalAverage.load_state`."""
        self._sum, self._count = _loaded("sum", state, size)


class ExponentialAverage:
    """m = d m + (1 - d) w after each model w, with d = min(`decay`, (1 + t) / (10 + t)) after t models before it.

    The smaller d at first lets the mean forget the models of the beginning, as in De et al. (2022); m is w at t = 0.
    """

    def __init__(self, decay: float, models: int) -> None:
        self._decay, self._end = decay, models - 1
        self._mean: torch.Tensor | None = None
        self._count = 0

    def take(self, parameters: torch.Tensor, position: int) -> torch.Tensor:
        """See `GlobalAverage.take`."""
        if self._mean is None:
            self._mean = parameters.double()
        else:
            decay = min(self._decay, (1 + self._count) / (10 + self._count))
            self._mean = decay * self._mean + (1 - decay) * parameters
        self._count += 1
        return parameters if position < self._end else self._mean.float()

    def state(self) -> dict[str, torch.Tensor]:
        """The mean, float64 (S,), and of how many; see `GlobalAverage.state`."""
        return _state("mean", self._mean, self._count)

    def load_state(self, state: Mapping[str, torch.Tensor], size: int) -> None:
        """See `GlobalAverage.load_state`."""
        self._mean, self._count = _loaded("mean", state, size)


def global_average(config: Config) -> GlobalAverage:
    """The mean that the configuration asks for: `training.ema_decay`, `training.average_last`, or the last model alone."""
    training = config.training
    if training.ema_decay is not None:
        return ExponentialAverage(training.ema_decay, config.global_models)
    return IterateAverage(training.average_last, config.global_models)


def _state(name: str, values: torch.Tensor | None, count: int) -> dict[str, torch.Tensor]:
    if values is None:
        return {}
    return {name: values.clone(), "count": torch.tensor([count], dtype=torch.int64)}


def _loaded(name: str, state: Mapping[str, torch.Tensor], size: int) -> tuple[torch.Tensor | None, int]:
    if not state:
        return None, 0
    fits = set(state) == {name, "count"} and state["count"].dtype == torch.int64 and state["count"].shape == (1,)
    if not fits or state[name].shape != (size,) or state[name].dtype != torch.float64 or int(state["count"]) < 1:
        raise ModelError("the mean of global models in a checkpoint cannot be", "resume from an earlier checkpoint")
    return state[name].clone(), int(state["count"])
