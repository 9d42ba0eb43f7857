"""Strategies of federated training: what the aggregator makes of an opened mean, and what stays at a hospital.

Round k, w the global parameters, hospital i with its update d_i (strategies `fedavg` and its kin), or step k with the
gradient g_i of hospital i (`fedsgd`, and every strategy with distributed noise):
  1. the secure sum opens the mean d of the updates, or the mean g of the gradients, to the aggregator alone
  2. the pseudo-gradient is -d, or g (Reddi et al., ICLR 2021, section 2)
  3. the server optimizer steps: `fedavg` w + lr d (McMahan et al., AISTATS 2017), `fedavgm` with momentum (Hsu, Qi, Brown
     2019), `fedadam` and `fedyogi` adaptively (Reddi et al., Algorithm 2)
  4. the new w goes to all hospitals

Privacy. Step 3 computes from opened values and its own state, which it made of earlier ones: post-processing, it costs
nothing whatever the optimizer, and the state may lie in the clear beside the opened values.

FedBN (Li et al., ICLR 2021) withholds scale, shift and statistics of normalisation layers from steps 1 to 4: `join_parts` puts a
hospital's own beside what it receives. What stays at a hospital shapes its later gradients, through which every patient
of it would reach what is opened. So under differential privacy it is trained with the same clipped, noised steps as the
rest, as if it were released, and the accountant covers it as it stands. With distributed noise a hospital
adds only a part of the noise, so the configuration refuses that. Statistics measured on the hospital's own patients carry
no noise: `calibrate_own` does that without differential privacy only, else they stay as measured on public images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError

_ADAPTIVE_LEARNING_RATE = 0.03
_MOMENTUM = 0.9
_SECOND_MOMENT_DECAY = 0.99  # Reddi et al., section 5.1
_ADAPTIVITY = 1e-3


class ServerOptimizer(Protocol):
    """A rule by which the aggregator steps. Its state is a function of opened values alone."""

    def step(self, parameters: torch.Tensor, pseudo_gradient: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """New parameters, float32 (P,), from float32 parameters and the float64 pseudo-gradient of the same shape.

        `factor` is what the schedule makes of the learning rate in this step. Computed in float64 and rounded once. Raises
        `ModelError` when a new parameter is no finite float32; the state then stays as it was.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """What the next step depends on, float64 (P,) each, for a checkpoint; empty before the first step."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on, bit for bit, where `state` was taken. Raises `ModelError` for the state of another strategy."""


class ServerSGD:
    """Gradient descent with momentum (Polyak's, as torch.optim.SGD): v = momentum * v + g, w = w - learning_rate * v.

    With learning rate 1, momentum 0 and g = -d it adds the mean update d exactly: FedAvg.
    """

    def __init__(self, learning_rate: float, momentum: float = 0.0) -> None:
        self._learning_rate, self._momentum = learning_rate, momentum
        self._velocity: torch.Tensor | None = None

    def step(self, parameters: torch.Tensor, pseudo_gradient: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """See `ServerOptimizer.step`."""
        _check_step(parameters, pseudo_gradient, self._velocity)
        velocity = pseudo_gradient if self._velocity is None else self._momentum * self._velocity + pseudo_gradient
        stepped = _rounded(parameters.double() - self._learning_rate * factor * velocity)
        if self._momentum:
            self._velocity = velocity.clone() if velocity is pseudo_gradient else velocity
        return stepped

    def state(self) -> dict[str, torch.Tensor]:
        """See `ServerOptimizer.state`."""
        return {} if self._velocity is None else {"velocity": self._velocity.clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `ServerOptimizer.load_state`."""
        _check_state(state, ("velocity",) if self._momentum else ())
        self._velocity = state["velocity"].clone() if state else None


class ServerAdam:
    """FedAdam, and FedYogi with `yogi` (Reddi et al., ICLR 2021, Algorithm 2), without bias correction as there.

    m = b m + (1 - b) g; Adam: v = c v + (1 - c) g^2; Yogi: v = v - (1 - c) g^2 sign(v - g^2);
    w = w - learning_rate * m / (sqrt(v) + tau), with b = `momentum`, c = 0.99, tau = `adaptivity`, m = 0 and v = tau^2
    at first.
    """

    def __init__(self, learning_rate: float, momentum: float, adaptivity: float, yogi: bool = False) -> None:
        self._learning_rate, self._momentum = learning_rate, momentum
        self._adaptivity, self._yogi = adaptivity, yogi
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self, parameters: torch.Tensor, pseudo_gradient: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """See `ServerOptimizer.step`."""
        _check_step(parameters, pseudo_gradient, self._moments[0] if self._moments else None)
        if self._moments is None:
            first, second = torch.zeros_like(pseudo_gradient), torch.full_like(pseudo_gradient, self._adaptivity**2)
        else:
            first, second = self._moments
        first = self._momentum * first + (1 - self._momentum) * pseudo_gradient
        squares = pseudo_gradient.square()
        if self._yogi:
            second = second - (1 - _SECOND_MOMENT_DECAY) * squares * torch.sign(second - squares)
        else:
            second = _SECOND_MOMENT_DECAY * second + (1 - _SECOND_MOMENT_DECAY) * squares
        direction = first / (second.sqrt() + self._adaptivity)
        stepped = _rounded(parameters.double() - self._learning_rate * factor * direction)
        self._moments = (first, second)
        return stepped

    def state(self) -> dict[str, torch.Tensor]:
        """See `ServerOptimizer.state`."""
        if self._moments is None:
            return {}
        return {"first_moment": self._moments[0].clone(), "second_moment": self._moments[1].clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `ServerOptimizer.load_state`."""
        _check_state(state, ("first_moment", "second_moment"))
        self._moments = (state["first_moment"].clone(), state["second_moment"].clone()) if state else None


def server_optimizer(config: Config) -> ServerOptimizer:
    """The server optimizer of `config.strategy`, at its start.

    With distributed noise its pseudo-gradient is the opened mean gradient, once per step, else minus the opened mean
    update, once per round. A hospital's update of `fedsgd` is minus its gradient times `training.learning_rate`, so
    there momentum alone is left to the server.
    """
    training, distributed = config.training, config.privacy.mechanism == "distributed"
    momentum = _MOMENTUM if training.server_momentum is None else training.server_momentum
    if config.strategy in ("fedadam", "fedyogi"):
        rate, adaptivity = training.server_learning_rate or _ADAPTIVE_LEARNING_RATE, training.server_adaptivity
        return ServerAdam(rate, momentum, adaptivity or _ADAPTIVITY, yogi=config.strategy == "fedyogi")
    if config.strategy == "fedsgd":
        return ServerSGD(training.learning_rate if distributed else 1.0, training.momentum)
    return ServerSGD(training.server_learning_rate or 1.0, momentum if config.strategy == "fedavgm" else 0.0)


def _check_step(parameters: torch.Tensor, pseudo_gradient: torch.Tensor, state: torch.Tensor | None) -> None:
    if parameters.dtype != torch.float32 or pseudo_gradient.dtype != torch.float64:
        raise ValueError("parameters are float32, pseudo-gradients float64")
    shapes = {parameters.shape, pseudo_gradient.shape, parameters.shape if state is None else state.shape}
    if len(shapes) != 1 or parameters.dim() != 1:
        raise ValueError("parameters, pseudo-gradient and state are vectors of one length")


def _rounded(parameters: torch.Tensor) -> torch.Tensor:
    stepped = parameters.float()
    if not bool(torch.isfinite(stepped).all()):
        raise ModelError("the server's step left the range of float32", "lower training.server_learning_rate")
    return stepped


def _check_state(state: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> None:
    shapes = {value.shape for value in state.values()}
    fits = set(state) == set(names) and len(shapes) == 1 and all(len(shape) == 1 for shape in shapes)
    if state and not (fits and all(value.dtype == torch.float64 for value in state.values())):
        raise ModelError(
            "the state of the server optimizer is not that of this strategy",
            "resume with the training.strategy, server_momentum and architecture of the checkpoint",
        )
