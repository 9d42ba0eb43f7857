"""The aggregator's side of simulated rounds: the steps of `aggregator_round`, with groups of hospitals in the place of links.

What is computed of an opened sum is the code of the real aggregator, and a sum is opened as a real one is: masked words are added
up, and where masks close the sum the keys of all hospitals take them away (`sharing.closed_sum`). Nobody is lost in a simulation,
so V is always U; whom no mask hides is the researcher, who has all data anyway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import plan_of
from mpc_fl.aggregation.rules import Rules
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.sums import KnownKeys, SumRequest, agreed_of, rules_of
from mpc_fl.apps.simulation.workers import Done, Workers
from mpc_fl.audit.opening_record import Opening, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import Evaluated as Of
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.distribution import model_to_give
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.federation.federated_sgd import keep_stepped, stepped_along
from mpc_fl.federation.final_round import fitted_calibration, with_chosen
from mpc_fl.federation.noised_calibration import plan_calibration
from mpc_fl.federation.noised_evaluation import plan_noised_evaluation
from mpc_fl.federation.peer_round import opened_json
from mpc_fl.federation.planning import headroom_of
from mpc_fl.federation.preparation import is_counted, take_features, take_patients
from mpc_fl.federation.secure_evaluation import Evaluated, log_accuracy, opened_evaluation
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import evaluation_length
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.training.per_sample_gradients import working_copy
from mpc_fl.sharing.closed_sum import ClosedSum

log = logging.getLogger(__name__)

# How far a phase is: its name, steps done, steps in all.
Tell = Callable[[str, int, int], None]
# Sees a sum that was opened.
Observe = Callable[[SumRequest, torch.Tensor], None]
Form = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class RoundDone:
    """What the aggregator notes of a round, and each hospital's own line about it, by name; no lines before the first round."""

    line: dict[str, Any]
    of_hospitals: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class SimulatedRounds:
    """All rounds of a run. `rules` are those of its sums, `record` is told of each before it is opened, `observe` sees it then."""

    aggregator: Aggregator
    rules: Rules
    workers: Workers
    record: OpeningRecord
    tell: Tell
    known: KnownKeys = field(default_factory=lambda: KnownKeys({}))
    observe: Observe | None = None

    @property
    def _config(self) -> Config:
        return self.aggregator.config

    def begin(self) -> RoundDone:
        """Hospitals load their data and take the model; then the sums of once, and a first evaluation."""
        workers, aggregator = self.workers, self.aggregator
        workers.each(HospitalGroup.load, self._follow("load data", 0, 1))
        keys = {name: key for of in workers.all(HospitalGroup.public_keys) for name, key in of.items()}
        self.known = KnownKeys.of(keys)
        workers.all(HospitalGroup.meet, keys, self.known)
        workers.all(HospitalGroup.take_model, model_to_give(aggregator))
        plan = self._plan(0)
        if self._config.data.normalise == "secure":
            features = plan_features(self._config)
            total = self._sum(SumRequest("features", plan), (torch.int64, (features.length,)))
            workers.all(HospitalGroup.take_normalisation, *take_features(aggregator, features, total))
        if is_counted(self._config, plan):
            total = self._sum(SumRequest("patients", plan), (torch.int64, (1,)))
            take_patients(aggregator, int(total), len(plan.hospitals))
        else:
            take_patients(aggregator, len(plan.hospitals), len(plan.hospitals))
        workers.all(HospitalGroup.end_preparation)
        opened = self._evaluate(plan)
        return RoundDone(self._line(plan, opened, 0.0))

    def round(self, number: int) -> RoundDone:
        """One round of training or the one after it that chooses the model, and what is evaluated after it."""
        began, plan, said = time.monotonic(), self._plan(number), dict[str, Any]()
        if number > self._config.training.rounds:
            said = self._choose(plan)
        elif self.aggregator.mechanism is None:
            self._average(plan)
        else:
            self._take_steps(plan)
        opened = self._evaluate(plan)
        line = self._line(plan, opened, time.monotonic() - began) | said
        lines = self.workers.all(HospitalGroup.metrics, number)
        return RoundDone(line, {name: own for of in lines for name, own in of.items()})

    def _plan(self, number: int) -> RoundPlan:
        """Everybody takes part in every round, in the first attempt."""
        aggregator, hospitals, starts = self.aggregator, self.rules.hospitals, self.known.fingerprints
        known = aggregator.normalisation is not None
        return RoundPlan(number, 0, hospitals, starts, (), aggregator.weight_total, number > 0, known)

    def _average(self, plan: RoundPlan) -> None:
        """The weighted mean of the updates, and the new model."""
        aggregator, shape = self.aggregator, tuple(self.aggregator.shared_parameters.shape)
        total = self._sum(SumRequest("update", plan), (headroom_of(self._config).dtype, shape))
        shared = aggregator.step_along_sum(total, len(plan.hospitals), plan.number)
        aggregator.digests.take(parameters=shared)
        self.workers.all(HospitalGroup.take_global, shared)

    def _take_steps(self, plan: RoundPlan) -> None:
        """Distributed noise: a sum for every single step."""
        aggregator, mechanism = self.aggregator, self.aggregator.mechanism
        assert mechanism is not None
        parameters = flatten_parameters(working_copy(aggregator.model))
        for step in range(self._config.training.local_steps):
            opened = self._sum(SumRequest("gradient", plan, step), (mechanism.dtype, (mechanism.parameters,)))
            parameters = stepped_along(aggregator, parameters, opened, len(plan.hospitals), (plan.number, step))
            aggregator.digests.take(parameters=parameters)
            self.workers.all(HospitalGroup.take_step, parameters)
        keep_stepped(aggregator, parameters)
        self.workers.all(HospitalGroup.keep_steps)

    def _choose(self, plan: RoundPlan) -> dict[str, Any]:
        """The final model, chosen and calibrated by validation patients; what is noted of both (`federation.final_round`)."""
        aggregator, workers, planned = self.aggregator, self.workers, plan_calibration(self._config)
        workers.all(HospitalGroup.begin_choice)
        final, said = with_chosen(aggregator)
        if "chosen" in said:
            shared = final.shared_parameters
            aggregator.digests.take(parameters=shared)
            workers.all(HospitalGroup.take_chosen, shared)
        if planned is not None:
            final.calibration = Calibration.none(len(self._config.data.classes))
            if aggregator.choice.candidate is not None:  # else no sum is made
                total = self._sum(SumRequest("calibration", plan), (torch.int64, (planned.grid.length,)))
                final.calibration = fitted_calibration(final, planned, total, len(plan.hospitals))
            values = final.calibration.tensor()
            aggregator.digests.take(calibration=values)
            workers.all(HospitalGroup.take_calibration, values)
            said["calibration"] = final.calibration.to_json()
        aggregator.model, aggregator.calibration = final.model, final.calibration
        return said

    def _evaluate(self, plan: RoundPlan) -> dict[Of, Evaluated]:
        """What is opened of evaluations after a round; where nothing is, each hospital still evaluates for itself."""
        config, opened = self._config, dict[Of, Evaluated]()
        kinds: tuple[Of, Of] = ("validation", "test")
        for whom in (whom for whom in kinds if config.evaluates(plan.number, whom)):
            noised = plan_noised_evaluation(config, whom)
            length = evaluation_length(len(config.data.classes)) if noised is None else noised.length
            total = self._sum(SumRequest(whom, plan), (torch.int64, (length,)))
            opened[whom] = opened_evaluation(config, total, len(plan.hospitals), whom)
        if "validation" in opened:
            self.aggregator.consider(plan.number, opened["validation"])
        if "test" in opened:
            log_accuracy(plan.number, opened["test"])
        elif plan.number > 0:
            follow = self._follow("evaluation", plan.number - 1, config.last_round)
            self.workers.each(HospitalGroup.evaluate, follow, plan.number)
        return opened

    def _line(self, plan: RoundPlan, opened: dict[Of, Evaluated], seconds: float) -> dict[str, Any]:
        """As the aggregator of a real run writes it."""
        return {"round": plan.number, "hospitals": list(plan.hospitals), "seconds": seconds} | opened_json(opened)

    # ---- a sum -----------------------------------------------------------------------------------------------------

    def _sum(self, request: SumRequest, form: Form) -> torch.Tensor:
        """The opened sum over all hospitals, ring elements of the dtype and shape of `form`."""
        config, workers, (dtype, shape) = self._config, self.workers, form
        rules, agreed = rules_of(config, self.rules, request), agreed_of(config, request, self.aggregator.digests)
        plan = plan_of(self.known, rules, agreed, agreed.hospitals, 0)
        workers.all(HospitalGroup.begin_sum, request)
        workers.each(HospitalGroup.add, self._follow(*self._place_of(request)))
        about, among, to = agreed.about, (*plan.hospitals, plan.opener), (plan.opener,)
        self.record.append(Opening(about.what, about.why, shape, to, among, about.privacy, plan.transcript))
        closed = ClosedSum(plan, dtype, shape)
        for added in workers.all(HospitalGroup.total):
            if plan.closing:
                for name, hashes in added.commitments.items():
                    closed.commitments.take(name, hashes)
            closed.take_added(list(added.commitments), added.words)
        keys = dict[str, torch.Tensor]()
        if plan.closing:
            for given in workers.all(HospitalGroup.keys, plan.hospitals, rules.smallest):
                keys |= given
        opened = closed.unmask(plan.hospitals, keys)
        if self.observe is not None:
            self.observe(request, opened)
        return opened

    def _place_of(self, request: SumRequest) -> tuple[str, int, int]:
        """Of which phase a sum is a part, which of its equal parts, of how many."""
        training, number = self._config.training, request.plan.number
        if request.kind == "update":
            return "training", number - 1, training.rounds
        if request.kind == "gradient":
            steps = training.local_steps
            return "training", (number - 1) * steps + request.step, training.rounds * steps
        if request.kind in ("validation", "test"):
            return "evaluation", max(0, number - 1), self._config.last_round
        return ("calibration" if request.kind == "calibration" else "preparation"), 0, 1

    def _follow(self, phase: str, part: int, parts: int) -> Done:
        """Tell how far a phase of so many equal parts is, hospital by hospital."""

        def done(hospitals: int, of: int) -> None:
            self.tell(phase, part * of + hospitals, parts * of)

        return done
