"""What the aggregator has over the rounds of a run: the global model, its optimizer, and sums that were opened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.config.config import Config
from mpc_fl.config.continuing import has_more_rounds
from mpc_fl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpc_fl.federation.choice import Choice, signed_round
from mpc_fl.federation.continuation import require_room_for_mean
from mpc_fl.federation.global_model import initial_model, normalisation_of_weights
from mpc_fl.federation.model_digests import ModelDigests
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.federation.planning import headroom_of, mechanism_of, require_public_values
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import Evaluation
from mpc_fl.learning.models.parameters import (
    flatten_parameters,
    join_parts,
    load_flat_parameters,
    shared_coordinates,
    trainable_parameters,
)
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.learning.training.iterate_average import GlobalAverage, global_average
from mpc_fl.learning.training.server_optimizers import ServerOptimizer, server_optimizer

log = logging.getLogger(__name__)


@dataclass
class Aggregator:
    """The aggregator's state over the rounds, all of it public or opened.

    `patients` is the opened number of training patients of `counted` hospitals, all that were there before the first round;
    `weight_total` the public power of two above it.
    """

    config: Config
    model: nn.Module
    mechanism: DistributedGaussian | None
    optimizer: ServerOptimizer
    average: GlobalAverage
    coordinates: torch.Tensor
    round: int = -1
    patients: int = 0
    counted: int = 0
    weight_total: int = 1
    normalisation: Normalisation | None = None
    choice: Choice = field(default_factory=Choice)
    calibration: Calibration | None = None  # of the final model, once it is fitted
    digests: ModelDigests = field(default_factory=ModelDigests)

    @property
    def shared_parameters(self) -> torch.Tensor:
        """What all hospitals have in common, float32 (S,)."""
        return flatten_parameters(self.model)[self.coordinates]

    def step(self, pseudo_gradient: torch.Tensor, number: int) -> torch.Tensor:
        """Step the shared parameters along a pseudo-gradient, float64 (S,), in round `number`; the new ones, float32 (S,)."""
        shared = self.average.take(self.optimizer.step(self.shared_parameters, pseudo_gradient), number - 1)
        load_flat_parameters(self.model, join_parts(shared, flatten_parameters(self.model), self.coordinates))
        return shared

    def step_along_sum(self, total: torch.Tensor, hospitals: int, number: int) -> torch.Tensor:
        """Step along the mean of the updates that the opened sum over so many hospitals holds, ring elements (S,), in round
        `number`; the new shared parameters, float32 (S,)."""
        return self.step(headroom_of(self.config).decode(total, -self.mean_factor(hospitals)), number)

    def consider(self, number: int, validation: Evaluation | NoisedEvaluation) -> None:
        """Take up what was opened of this model on validation patients after round `number`."""
        self.choice.consider(self.config, number, validation, self.shared_parameters)
        figure, criterion = self.choice.figures[number], self.config.evaluation.criterion.replace("_", " ")
        log.info("round %d: %s %.1f %% on the validation patients of all hospitals", number, criterion, 100 * figure)

    def mean_factor(self, hospitals: int) -> float:
        """What turns the opened sum over so many hospitals into their mean.

        Weights are counts over `weight_total`. The total of those counted is known; how many patients those present have is
        not, or the difference would show an absent hospital's number: they count as their share of the hospitals.
        """
        return self.weight_total / self.patients * self.counted / hospitals

    def checkpoint(self, directory: Path, number: int) -> None:
        """Keep the state after round `number`."""
        self.round = number
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state().items()}
        tensors |= {f"choice.{name}": value for name, value in self.choice.state().items()}
        if self.normalisation is not None:
            tensors["normalisation"] = self.normalisation.tensor()
        if self.calibration is not None:
            tensors["calibration"] = self.calibration.tensor()
        facts = {"patients": self.patients, "counted": self.counted, "weight total": self.weight_total}
        save_checkpoint(directory, Checkpoint(number, tensors, facts), self.config)

    def resume(self, directory: Path, signed: Callable[[int], str | None]) -> bool:
        """Go back to the last checkpoint that holds the global model which all signed; False when there is none.

        `signed(round)` is the digest of that model. Raises `MpcFlError` when no checkpoint is what it should be.
        """

        def wrong(saved: Checkpoint) -> str | None:
            return self._wrong(saved, signed(saved.round)) or _wrong_choice(saved, signed)

        saved = load_checkpoint(directory, self.config, check=wrong)
        if saved is None:
            return False
        self.model.load_state_dict(_part(saved, "model"))
        self.optimizer.load_state(_part(saved, "optimizer"))
        if has_more_rounds(
            saved.settings, self.config
        ):  # the mean is over later models now, and none of them is there yet
            require_room_for_mean(self.config, saved.round)
        else:
            self.average.load_state(_part(saved, "average"), len(self.shared_parameters))
        self.choice.load_state(_part(saved, "choice"))
        if "calibration" in saved.tensors:
            self.calibration = Calibration.of_tensor(saved.tensors["calibration"])
            self.digests.take(calibration=saved.tensors["calibration"])
        if "normalisation" in saved.tensors:
            self.normalisation = Normalisation.of_tensor(saved.tensors["normalisation"], self.config)
        self.round, self.patients, self.weight_total = saved.round, saved.facts["patients"], saved.facts["weight total"]
        self.counted = saved.facts.get("counted", self.config.federation.hospitals)  # all of them, once
        return True

    def _wrong(self, saved: Checkpoint, signed: str | None) -> str | None:
        """What is wrong with a checkpoint that is whole, given the digest of the model that all signed for its round."""
        state, forms = _part(saved, "model"), _forms(self.model.state_dict())
        if _forms(state) != forms:
            return "holds another network"
        patients, total = saved.facts.get("patients"), saved.facts.get("weight total")
        if type(patients) is not int or type(total) is not int or patients < 0 or total < 1 or total & (total - 1):
            return "holds numbers of patients that cannot be"
        if saved.facts.get("counted", 1) not in range(1, self.config.federation.hospitals + 1):
            return "holds a number of hospitals that cannot be"
        parameters = [state[name].reshape(-1).float() for name, _ in trainable_parameters(self.model)]
        if tensor_digest(torch.cat(parameters)[self.coordinates]) != signed:
            return f"holds another global model than all parties signed after round {saved.round}"
        return None


def _wrong_choice(saved: Checkpoint, signed: Callable[[int], str | None]) -> str | None:
    """What is wrong with the candidate in a checkpoint: it must be the model that all signed for its round."""
    try:
        found = signed_round(_part(saved, "choice"))
    except ValueError:
        return "holds a choice of rounds that cannot be"
    if found is not None and signed(found[0]) != found[1]:
        return f"holds another candidate than the model that all parties signed after round {found[0]}"
    return None


def _part(saved: Checkpoint, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part of a checkpoint, by their names in it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in saved.tensors.items() if name.startswith(prefix)}


def _forms(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (value.dtype, value.shape) for name, value in state.items()}


def prepare_aggregator(config: Config) -> Aggregator:
    """The aggregator before the first round. Raises `HeadroomError` when sums could wrap."""
    headroom_of(config).require()
    require_public_values(config)
    mechanism = mechanism_of(config) if config.privacy.mechanism == "distributed" else None
    model = initial_model(config)
    coordinates = shared_coordinates(model, config.training.local_normalisation)
    average = global_average(config)
    optimizer, normalisation = server_optimizer(config), normalisation_of_weights(config)
    return Aggregator(config, model, mechanism, optimizer, average, coordinates, normalisation=normalisation)
