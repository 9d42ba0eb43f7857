"""A round among peers at a hospital: the steps of `hospital_round` and those of `aggregator_round`, both at every hospital.

Each sum is a peer sum (`aggregation.peer_sum`) under a transcript that all have signed before anybody trains for it
(`aggregation.peer_plan`). All hospitals in it learn it, and each steps along it by itself. What is computed before and after a
sum is the same code as with an aggregator, so the model is the same, bit for bit, from the same updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mpc_fl.aggregation.peer_plan import signed_plan
from mpc_fl.aggregation.peer_sum import peer_sum
from mpc_fl.aggregation.rules import AgreedSum, Rules
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.config.evaluation import Evaluated as Of
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import LeftOutError, ProtocolError, QuorumError, SumLostError
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.federation.federated_sgd import (
    OwnGradients,
    Steps,
    agreed_gradient,
    keep_stepped,
    stepped_along,
)
from mpc_fl.federation.final_round import (
    calibration_sum,
    chosen_json,
    fitted_calibration,
    own_changes,
    take_candidate,
)
from mpc_fl.federation.global_model import calibrate_own
from mpc_fl.federation.group_evaluation import GroupsOpened, OwnDecisions
from mpc_fl.federation.group_sums import (
    agreed_counts,
    agreed_sizes,
    cells_by,
    opened_groups,
    own_counts,
    own_sizes,
    planned_groups,
)
from mpc_fl.federation.local_update import (
    agreed_update,
    charge_round,
    figures_of,
    keep_trained,
    progress_of,
    trained_update,
)
from mpc_fl.federation.model_digests import sum_terms
from mpc_fl.federation.noised_calibration import CalibrationPlan, plan_calibration
from mpc_fl.federation.peer_state import Peer
from mpc_fl.federation.planning import with_norm_check
from mpc_fl.federation.preparation import (
    FEATURES,
    PATIENTS,
    agreed_once,
    is_counted,
    own_count,
    own_features,
    take_features,
    take_patients,
)
from mpc_fl.federation.secure_evaluation import (
    Evaluated,
    agreed_evaluation,
    counts_to_sum,
    evaluation_rules,
    log_accuracy,
    opened_evaluation,
    own_evaluation,
    phase_of,
)
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import Evaluation
from mpc_fl.learning.models.parameters import load_flat_buffers
from mpc_fl.learning.training.dp_sgd import LocalRound
from mpc_fl.progress import Notify
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

Release = Callable[[], None]
Summand = tuple[Private[torch.Tensor], Release | None]


@dataclass(frozen=True)
class PeerRound:
    """A round of `plan` at a hospital. `rules` have the proposer as opener. `refused`: who was not shown to be within the norm
    bound, and the transcript (hex) of the sum that it was left out of. `of_groups`: what its line says of groups of test patients.
    """

    peer: Peer
    domain: SecretDomain
    ledger: RevealLedger
    rules: Rules
    plan: RoundPlan
    notify: Notify
    refused: dict[str, str] = field(default_factory=dict)
    of_groups: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> tuple[str, ...]:
        """The sums before the first round. Returns the hospitals that are in them."""
        hospital, common, plan, hospitals = self.peer.hospital, self.peer.common, self.plan, self.plan.hospitals
        config, ledger = hospital.config, self.ledger
        self.domain.links.set_phase("preparation")
        if config.data.normalise == "secure":
            features = plan_features(config)
            agreed = agreed_once(config, ledger, hospitals, plan, FEATURES, common.digests)
            hospitals, total = self._sum(
                self.rules, agreed, lambda: (own_features(hospital, features, plan), hospital.releasing(0))
            )
            _, buffers = take_features(common, features, total)
            assert common.normalisation is not None
            hospital.normalise(common.normalisation)
            load_flat_buffers(hospital.model, buffers)
        if is_counted(config, plan):
            agreed = agreed_once(config, ledger, hospitals, plan, PATIENTS, common.digests)
            hospitals, total = self._sum(self.rules, agreed, lambda: (own_count(hospital), hospital.releasing(0)))
            take_patients(common, int(total), len(hospitals))
        elif not config.counts_patients:
            take_patients(common, config.federation.hospitals, config.federation.hospitals)
        calibrate_own(hospital.model, hospital.train.inputs, config)
        return hospitals

    def train(self) -> tuple[tuple[str, ...], dict[str, Any], dict[str, float]]:
        """Train, and step along the sum: the hospitals in it, this site's figures of its steps, and seconds by what took them."""
        hospital, number, links = self.peer.hospital, self.plan.number, self.domain.links
        began = time.monotonic()
        links.set_phase(f"round {number} aggregation")
        if hospital.noise_multiplier is not None:
            charge_round(hospital, number)
        before = links.seconds_of(f"round {number} training")
        hospitals, steps = self._steps() if hospital.mechanism is not None else self._update()
        train_seconds = links.seconds_of(f"round {number} training") - before
        aggregate_seconds = time.monotonic() - began - train_seconds
        log.info("round %d: trained in %.1f s, aggregated in %.1f s", number, train_seconds, aggregate_seconds)
        self.notify("aggregation", number, hospital.config.training.rounds)
        return hospitals, figures_of(steps), {"train": train_seconds, "aggregate": aggregate_seconds}

    def _update(self) -> tuple[tuple[str, ...], Steps]:
        """Local training, and one sum of the weighted updates."""
        hospital, common, plan, links = self.peer.hospital, self.peer.common, self.plan, self.domain.links
        kept = list[LocalRound]()

        def summand() -> Summand:
            links.set_phase(f"round {plan.number} training")
            trained = trained_update(hospital, links.set_phase, plan, self.notify)
            kept.append(trained.local)
            return trained.encoded, hospital.releasing(plan.number)

        rules = self._of_updates
        hospitals, total = self._sum(rules, agreed_update(hospital.config, plan, common.digests), summand)
        shared = common.step_along_sum(total, len(hospitals), plan.number)
        common.digests.take(parameters=shared)
        return hospitals, keep_trained(hospital, kept[0], shared)

    def _steps(self) -> tuple[tuple[str, ...], Steps]:
        """Distributed noise: a sum for every single step."""
        hospital, common, plan, links = self.peer.hospital, self.peer.common, self.plan, self.domain.links
        gradients, hospitals, config = OwnGradients(hospital, plan), plan.hospitals, hospital.config
        step_done, count = progress_of(config, plan.number, self.notify), config.training.local_steps
        rules = self._of_updates
        for step in range(count):

            def summand(step: int = step) -> Summand:
                links.set_phase(f"round {plan.number} training")
                share = gradients.share(step)
                links.set_phase(f"round {plan.number} aggregation")
                return share, hospital.ledger.release

            agreed = agreed_gradient(config, hospitals, plan, step, common.digests)
            hospitals, opened = self._sum(rules, agreed, summand)
            stepped = stepped_along(common, gradients.parameters, opened, len(hospitals), (plan.number, step))
            common.digests.take(parameters=stepped)
            gradients.step_to(stepped)
            step_done(step + 1, count)
        kept = gradients.keep()
        keep_stepped(common, gradients.parameters)
        return hospitals, kept

    def conclude(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The round after training (`final_round`): choose the model, and calibrate it. The hospitals in it, what its line says."""
        hospital, common, plan, said = self.peer.hospital, self.peer.common, self.plan, dict[str, Any]()
        config, hospitals = hospital.config, plan.hospitals
        self.domain.links.set_phase(f"round {plan.number} choice")
        if config.evaluation.choose == "best":
            number = take_candidate(common)
            said |= chosen_json(common, number)
            common.digests.take(parameters=common.shared_parameters)
            hospital.take_global(common.shared_parameters)
            log.info("the model after round %d is chosen", number)
        planned = plan_calibration(config)
        if planned is not None:
            hospitals, common.calibration = self._calibrate(planned)
            common.digests.take(calibration=common.calibration.tensor())
            hospital.calibration = common.calibration
            said["calibration"] = common.calibration.to_json()
        return hospitals, said

    def _calibrate(self, planned: CalibrationPlan) -> tuple[tuple[str, ...], Calibration]:
        """Who is left, and what all fit alike; nothing is changed where nothing was validated, or too few are there."""
        hospital, common, plan, config = self.peer.hospital, self.peer.common, self.plan, self.peer.hospital.config
        self.domain.links.set_phase(f"round {plan.number} calibration")
        rules, unchanged = (
            evaluation_rules(config, self.rules, "validation"),
            Calibration.none(len(config.data.classes)),
        )
        if common.choice.candidate is None or len(plan.hospitals) < rules.smallest:
            return plan.hospitals, unchanged
        seen = sum_terms(config, plan.weight_total, common.digests)
        agreed = calibration_sum(plan, plan.hospitals, config, seen)
        try:
            present, total = self._sum(rules, agreed, lambda: own_changes(hospital, plan, planned))
        except QuorumError as error:  # nothing was opened, which all of them have found alike
            log.warning("%s", error)
            return plan.hospitals, unchanged
        return present, fitted_calibration(common, planned, total, len(present))

    def evaluate(self, hospitals: tuple[str, ...]) -> tuple[Evaluation, dict[Of, Evaluated]]:
        """This site's own evaluation, and what was opened over all hospitals, by whose patients.

        Raises `SumLostError` for a sum that was lost: the model of the round is there without it.
        """
        config, opened = self.peer.hospital.config, dict[Of, Evaluated]()
        if config.evaluates(self.plan.number, "validation"):
            _, hospitals = self._evaluate(hospitals, "validation", opened)
        found, present = self._evaluate(hospitals, "test", opened)
        if "test" in opened:
            log_accuracy(self.plan.number, opened["test"])
            if config.evaluates_groups(self.plan.number):
                self._evaluate_groups(present, found, opened["test"])
        self.notify("evaluation", self.plan.number, config.training.rounds)
        return found.own, opened

    def _evaluate(
        self, hospitals: tuple[str, ...], whom: Of, opened: dict[Of, Evaluated]
    ) -> tuple[OwnDecisions, tuple[str, ...]]:
        hospital, common, plan = self.peer.hospital, self.peer.common, self.plan
        config, rules = hospital.config, evaluation_rules(hospital.config, self.rules, whom)
        self.domain.links.set_phase(f"round {plan.number} {phase_of(whom)}")
        if not config.evaluates(plan.number, whom) or len(hospitals) < rules.smallest:
            return own_evaluation(hospital, plan.number, whom), hospitals
        kept = list[OwnDecisions]()

        def summand() -> Summand:
            kept.append(own_evaluation(hospital, plan.number, whom))
            return counts_to_sum(hospital, kept[0], plan, whom)

        agreed = agreed_evaluation(config, hospitals, plan, whom, common.digests)
        try:
            present, total = self._sum(rules, agreed, summand)
        except QuorumError as error:  # nothing was opened, which all of them have found alike
            log.warning("%s", error)
            return kept[0], hospitals
        try:
            opened[whom] = opened_evaluation(config, total, len(present), whom)
        except ProtocolError as error:  # whose counts are false nobody can tell, and the model stands without them
            log.warning("%s; round %d has no figure", error, plan.number)
        else:
            if whom == "validation":
                common.consider(plan.number, opened[whom])
        return kept[0], present

    def _evaluate_groups(self, hospitals: tuple[str, ...], found: OwnDecisions, evaluation: Evaluated) -> None:
        """The two sums of `group_sums`, over those that are in the evaluation of all test patients."""
        hospital, plan, digests = self.peer.hospital, self.plan, self.peer.common.digests
        config, rules = hospital.config, evaluation_rules(hospital.config, self.rules, "test")
        self.domain.links.set_phase(f"round {plan.number} groups")
        if len(hospitals) < rules.smallest:
            return
        try:
            agreed = agreed_sizes(config, hospitals, plan, digests)
            hospitals, sizes = self._sum(rules, agreed, lambda: own_sizes(hospital, plan))
            cells = cells_by(planned_groups(config), sizes, len(hospitals))
            opened = GroupsOpened(planned_groups(config), (), ())
            counted = agreed_counts(config, hospitals, plan, digests, sizes)
            if counted is not None:
                hospitals, total = self._sum(rules, counted, lambda: own_counts(hospital, plan, cells, found))
                opened = opened_groups(config, cells, total, len(hospitals), evaluation)
        except QuorumError as error:  # nothing was opened, which all of them have found alike
            log.warning("%s", error)
        except SumLostError:
            raise
        except ProtocolError as error:  # whose counts are false nobody can tell, and the model stands without them
            log.warning("%s; round %d has no groups", error, plan.number)
        else:
            self.of_groups["groups"] = opened.to_json()

    def _sum(
        self, rules: Rules, agreed: AgreedSum, summand: Callable[[], Summand]
    ) -> tuple[tuple[str, ...], torch.Tensor]:
        """V, and the sum over V. `summand` is made when all have signed what it is for, within the time that rules give for it.

        Raises `SumLostError` where it is lost, and `PeerLostError` naming this hospital where the others opened it without it.
        """
        plan = signed_plan(self.domain, rules, agreed)
        until = time.monotonic() + rules.seconds
        encoded, release = summand()
        remaining = replace(rules, seconds=max(0.0, until - time.monotonic()))
        admitted, total = peer_sum(self.domain, remaining, agreed, plan, encoded, release)
        if total is None:
            why = "for which its part came late" if rules.check is None else "as its update was not shown to be short"
            raise LeftOutError(self.domain.links.name, f"'{agreed.about.why}', {why}")
        if rules.check is not None:  # which all others have passed: none is made without all of U
            self.refused.update({name: plan.transcript for name in plan.hospitals if name not in admitted})
        return admitted, total

    @property
    def _of_updates(self) -> Rules:
        """Of the sums whose norms may be checked."""
        hospital = self.peer.hospital
        size, mechanism = len(hospital.shared_parameters), hospital.mechanism
        return with_norm_check(self.rules, hospital.config, mechanism, size, self.plan.weight_total)


def opened_json(opened: dict[Of, Evaluated]) -> dict[str, Any]:
    """What the line about a round says of its evaluations."""
    line: dict[str, Any] = {"evaluation": opened["test"].to_json() if "test" in opened else None}
    return line | ({"validation": opened["validation"].to_json()} if "validation" in opened else {})
