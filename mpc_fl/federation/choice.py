"""Which round's model becomes that of the run: the one with the best figure on validation patients, of equal ones the last.

The figure of every validated round stands in the reveal ledger, signed by all beside the model of that round; so all can
check which round was to be chosen, and that the model is that round's. With `evaluation.choose: last` it is the last validated one.
Choosing among opened figures is post-processing: it costs no privacy beyond what opening them did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.config.config import Config
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.learning.models.evaluation import Evaluation

_DIGITS = 5


@dataclass(frozen=True)
class Candidate:
    """The model to be taken so far: shared parameters float32 (S,) after `round`, and counts by true class, float64 (k,)."""

    round: int
    parameters: torch.Tensor
    totals: torch.Tensor


def best_round(figures: Mapping[int, float]) -> int:
    """The round with the largest figure, the last of equal ones; there is at least one."""
    return max(figures, key=lambda number: (figures[number], number))


def figure_of(config: Config, evaluated: Evaluation | NoisedEvaluation) -> float:
    """What models are compared by, from 0 to 1."""
    named = {"accuracy": evaluated.accuracy, "balanced_accuracy": evaluated.balanced_accuracy}
    return round(float(named[config.evaluation.criterion]), _DIGITS)


@dataclass
class Choice:
    """The aggregator's choice so far: the opened figures by round, and the candidate."""

    figures: dict[int, float] = field(default_factory=dict)
    candidate: Candidate | None = None

    def consider(
        self, config: Config, number: int, evaluated: Evaluation | NoisedEvaluation, parameters: torch.Tensor
    ) -> None:
        """Take up what was opened of the model with these shared parameters, float32 (S,), after round `number`."""
        self.figures[number] = figure_of(config, evaluated)
        if not config.evaluation.chooses:
            return
        counts = evaluated.confusion if isinstance(evaluated, Evaluation) else evaluated.counts
        if config.evaluation.choose == "last" or best_round(self.figures) == number:
            self.candidate = Candidate(number, parameters.clone(), counts.double().sum(dim=1))

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps; empty before the first figure."""
        if not self.figures:
            return {}
        tensors = {"figures": torch.tensor(sorted(self.figures.items()), dtype=torch.float64)}
        if self.candidate is not None:
            tensors |= {
                "round": torch.tensor([self.candidate.round]),
                "parameters": self.candidate.parameters,
                "totals": self.candidate.totals,
            }
        return tensors

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where `state` was taken; `wrong_choice` comes first."""
        rows = state["figures"].tolist() if state else []
        self.figures = {int(number): figure for number, figure in rows}
        self.candidate = None
        if "round" in state:
            self.candidate = Candidate(int(state["round"]), state["parameters"].clone(), state["totals"].clone())


def signed_round(state: Mapping[str, torch.Tensor]) -> tuple[int, str] | None:
    """Round and digest of the model of a candidate in a checkpoint; None without one. Raises `ValueError` for what cannot be."""
    if not state:
        return None
    figures = state.get("figures")
    if figures is None or figures.dtype != torch.float64 or figures.dim() != 2 or figures.shape[1:] != (2,):
        raise ValueError("no figures")
    if "round" not in state:
        return None
    number, parameters, totals = state["round"], state.get("parameters"), state.get("totals")
    if number.dtype != torch.int64 or number.numel() != 1 or parameters is None or totals is None:
        raise ValueError("no candidate")
    if totals.dtype != torch.float64 or totals.dim() != 1 or float(number) not in figures[:, 0].tolist():
        raise ValueError("no candidate")
    return int(number), tensor_digest(parameters)
