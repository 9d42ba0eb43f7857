"""The mean of the last global models instead of the last one (Polyak and Juditsky, 1992): noise of single steps averages out.

The aggregator takes it of models that are opened anyway, so it costs no privacy (post-processing) and no message.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mpc_fl.errors import ModelError


class IterateAverage:
    """Takes every global model, float32 (S,), and says which one is to be sent: itself, or at the last position the mean.

    A run has positions 0 to `models` - 1; the mean is over all models taken from position `models` - `last` on. Where a round is
    made anew its positions come again, and those models count as well. None for `last`: no mean is taken.
    """

    def __init__(self, last: int | None, models: int) -> None:
        self._begin, self._end = models - (last or 1), models - 1
        self._averages = last is not None and last > 1
        self._sum: torch.Tensor | None = None
        self._count = 0

    def take(self, parameters: torch.Tensor, position: int) -> torch.Tensor:
        """What is sent after the sum at `position`, float32 (S,)."""
        if not self._averages or position < self._begin:
            return parameters
        self._sum = parameters.double() if self._sum is None else self._sum + parameters
        self._count += 1
        return parameters if position < self._end else (self._sum / self._count).float()

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: the sum, float64 (S,), and of how many; empty before the first."""
        if self._sum is None:
            return {}
        return {"sum": self._sum.clone(), "count": torch.tensor([self._count], dtype=torch.int64)}

    def load_state(self, state: Mapping[str, torch.Tensor], size: int) -> None:
        """Go on where `state` was taken, for S = `size`. Raises `ModelError` for what cannot be such a state."""
        if not state:
            self._sum, self._count = None, 0
            return
        fits = set(state) == {"sum", "count"} and state["count"].dtype == torch.int64 and state["count"].shape == (1,)
        if not fits or state["sum"].shape != (size,) or state["sum"].dtype != torch.float64 or int(state["count"]) < 1:
            raise ModelError("the mean of global models in a checkpoint cannot be", "resume from an earlier checkpoint")
        self._sum, self._count = state["sum"].clone(), int(state["count"])
