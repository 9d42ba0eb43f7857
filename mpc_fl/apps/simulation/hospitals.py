"""A group of simulated hospitals in one process: each trains, counts, charges its privacy ledger and masks by itself.

What the hospitals of a group share is what costs and says nothing about a patient: the records found and divided, the first
model, how gradients are computed. Each has its own model, patients, privacy ledger, seeds, and X25519 key, fresh for the run.

A sum goes so: `begin_sum` for all, `add` for each hospital, then `total`, and `keys` where masks close the sum. What leaves a
group is masked words added up, and of hospitals that may be left out commitments and keys, as on the way to a real aggregator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import plan_of
from mpc_fl.apps.simulation.sums import KnownKeys, SumRequest, agreed_of, rules_of
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.distribution import GlobalModel, take_model
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.federation.federated_sgd import OwnGradients, Steps
from mpc_fl.federation.final_round import own_changes
from mpc_fl.federation.global_model import calibrate_own
from mpc_fl.federation.hospital_program import joined_hospital
from mpc_fl.federation.hospital_state import Beginning, Hospital
from mpc_fl.federation.local_update import charge_round, figures_of, keep_trained, trained_update
from mpc_fl.federation.noised_calibration import plan_calibration
from mpc_fl.federation.planning import sum_rules
from mpc_fl.federation.preparation import own_count, own_features, take_normalisation
from mpc_fl.federation.secure_evaluation import counts_to_sum, own_evaluation
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import DividedRecords, divided_records, load_own
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import Evaluation
from mpc_fl.learning.training.dp_sgd import LocalRound
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.keys import PairwiseKeys
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.sum_plan import SumPlan

Release = Callable[[], None]
_PURPOSE = "closed sums"


@dataclass(repr=False)
class Simulated:
    """One hospital, its keys, and what it holds of the round and of the sum that are under way."""

    hospital: Hospital
    keys: PairwiseKeys
    seeds: dict[str, Seed] = field(default_factory=dict)
    masks: SummandMasks | None = None
    trained: LocalRound | None = None
    gradients: OwnGradients | None = None
    steps: Steps | None = None
    own: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def seed_with(self, other: str) -> Seed:
        """The seed for closed sums that only this hospital and the other one know."""
        if other not in self.seeds:
            self.seeds[other] = self.keys.seed(other, _PURPOSE)
        return self.seeds[other]

    def spend(self, what: str, began: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began


@dataclass(frozen=True, repr=False)
class AddedSummands:
    """The masked summands of a group added up, and to which keys each of its hospitals committed."""

    words: torch.Tensor
    commitments: Mapping[str, list[str]]


class HospitalGroup:
    """The hospitals of these ranks. `config` says with `site.out` where their privacy ledgers lie."""

    def __init__(self, config: Config, ranks: Sequence[int]) -> None:
        self.config, self.ranks = config, tuple(ranks)
        self._beginning, self._rules = Beginning(config), sum_rules(config)
        self._records: dict[Part, DividedRecords] = {}
        self.hospitals: dict[int, Simulated] = {}
        self._known = KnownKeys({})
        self._request: SumRequest | None = None
        self._plans: dict[str, SumPlan] = {}
        self._words: torch.Tensor | None = None

    def load(self, rank: int) -> None:
        """Read one hospital's patients and plan what may be released of them. Raises what a real hospital raises."""
        hospital = joined_hospital(self._beginning, rank, lambda part: self.read(rank, part), lambda *_: None)
        agreement = Agreement(self.config.federation.session, self.config.digest(), self.config.task)
        self.hospitals[rank] = Simulated(hospital, PairwiseKeys(hospital.name, agreement))

    def read(self, rank: int, part: Part) -> Dataset:
        """The records of one hospital. A group with records of its own says here what they are."""
        if part not in self._records:
            self._records[part] = divided_records(self.config, part)
        return load_own(self._records[part], rank)

    def public_keys(self) -> dict[str, bytes]:
        """The X25519 public key of each hospital, once all are loaded: what was read for them is then let go."""
        self._records.clear()
        return {each.hospital.name: each.keys.public_key for each in self.hospitals.values()}

    def meet(self, public_keys: Mapping[str, bytes], known: KnownKeys) -> None:
        """All hospitals of this group take the public keys of all hospitals of the run."""
        self._known = known
        for each in self.hospitals.values():
            for name, public_key in public_keys.items():
                if name != each.hospital.name:
                    each.keys.learn(name, public_key)

    def take_model(self, given: GlobalModel) -> None:
        """All begin with this model, as newcomers of a real run do."""
        for hospital in self._hospitals():
            take_model(hospital, given)
            calibrate_own(hospital.model, hospital.train.inputs, self.config)

    def take_normalisation(self, values: torch.Tensor, buffers: torch.Tensor) -> None:
        """All bring their inputs to what the sum of features gave."""
        for hospital in self._hospitals():
            take_normalisation(hospital, values, buffers)

    def end_preparation(self) -> None:
        """After the sums before the first round."""
        for hospital in self._hospitals():
            calibrate_own(hospital.model, hospital.train.inputs, self.config)

    def _hospitals(self) -> list[Hospital]:
        return [each.hospital for each in self.hospitals.values()]

    # ---- a sum -----------------------------------------------------------------------------------------------------

    def begin_sum(self, request: SumRequest) -> None:
        """Say which sum `add` is for."""
        self._request, self._words = request, None
        self._plans.clear()

    def add(self, rank: int) -> None:
        """One hospital makes its summand, masks it under what it itself saw of the sum, and adds the masked words to the others'.

        Raises `HeadroomError` and `PrivacyBudgetError` before anything leaves, as at a real hospital.
        """
        each, request = self.hospitals[rank], self._request
        assert request is not None  # `begin_sum` came first
        encoded, release = self.summand(each, request)
        began, shape = time.monotonic(), encoded.inside_protocol().shape
        each.masks = SummandMasks(self._plan_at(each.hospital), each.hospital.name, shape, each.seed_with)
        words = each.masks.masked(encoded, in_place=True)
        if release is not None:
            release()
        self._words = words if self._words is None else self._words.add_(words)
        each.spend("aggregate", began)

    def _plan_at(self, hospital: Hospital) -> SumPlan:
        """The sum as this hospital has it; hospitals with the same model have the same, which is then made once."""
        assert self._request is not None
        agreed = agreed_of(self.config, self._request, hospital.digests)
        key = repr(sorted(agreed.seen.items()))
        if key not in self._plans:
            rules = rules_of(self.config, self._rules, self._request)
            self._plans[key] = plan_of(self._known, rules, agreed, agreed.hospitals, 0)
        return self._plans[key]

    def total(self) -> AddedSummands:
        """What leaves this group: masked words of all its hospitals added up, int32 or int64."""
        assert self._words is not None  # each has added its own
        words, self._words = self._words, None
        masks = [each.masks for each in self.hospitals.values() if each.masks is not None]
        return AddedSummands(words, {of.me: of.commitments() if of.plan.closing else [] for of in masks})

    def keys(self, admitted: Sequence[str], smallest: int) -> dict[str, torch.Tensor]:
        """Of each hospital the keys that open the sum over all, uint8 (count, 32), once."""
        masks = [each.masks for each in self.hospitals.values() if each.masks is not None]
        return {of.me: of.keys_for(admitted, smallest) for of in masks}

    def summand(self, each: Simulated, request: SumRequest) -> tuple[Private[torch.Tensor], Release | None]:
        """What a hospital adds to this sum, and what enters its privacy ledger before it leaves.

        A group that deviates says here what it adds instead.
        """
        hospital, plan, began = each.hospital, request.plan, time.monotonic()
        if request.kind == "features":
            return own_features(hospital, plan_features(self.config), plan), hospital.releasing(0)
        if request.kind == "patients":
            return own_count(hospital), hospital.releasing(0)
        if request.kind == "calibration":
            planned = plan_calibration(self.config)
            assert planned is not None  # the sum would not be asked for
            return own_changes(hospital, plan, planned)
        if request.kind in ("validation", "test"):
            found = own_evaluation(hospital, plan.number, request.whom)
            each.own = found.own
            summand = counts_to_sum(hospital, found, plan, request.whom)
            each.spend("evaluate", began)
            return summand
        if hospital.noise_multiplier is not None and request.step == 0:
            charge_round(hospital, plan.number)
        if request.kind == "gradient":
            if request.step == 0:
                each.gradients = OwnGradients(hospital, plan)
            assert each.gradients is not None
            share = each.gradients.share(request.step)
            each.spend("train", began)
            return share, hospital.ledger.release
        trained = trained_update(hospital, lambda _: None, plan, lambda *_: None)
        each.trained = trained.local
        each.spend("train", began)
        return trained.encoded, hospital.releasing(plan.number)

    # ---- what the aggregator sends ---------------------------------------------------------------------------------

    def take_global(self, shared: torch.Tensor) -> None:
        """All put the new shared parameters, float32 (S,), beside what each has trained."""
        digest = tensor_digest(shared)
        for each in self.hospitals.values():
            assert each.trained is not None
            each.steps, each.trained = keep_trained(each.hospital, each.trained, shared), None
            each.hospital.digests.parameters = digest

    def take_step(self, parameters: torch.Tensor) -> None:
        """All go on from the parameters after a step, float32 (P,)."""
        digest = tensor_digest(parameters)
        for each in self.hospitals.values():
            assert each.gradients is not None
            each.gradients.step_to(parameters)
            each.hospital.digests.parameters = digest

    def keep_steps(self) -> None:
        """The last step of a round was made."""
        for each in self.hospitals.values():
            assert each.gradients is not None
            each.steps, each.gradients = each.gradients.keep(), None
            each.hospital.digests.take(parameters=each.hospital.shared_parameters)

    def begin_choice(self) -> None:
        """In the round after training all go back to an uncalibrated model."""
        for hospital in self._hospitals():
            hospital.calibration, hospital.digests.calibration = None, ""

    def take_chosen(self, shared: torch.Tensor) -> None:
        """All go back to the shared parameters of the chosen round, float32 (S,)."""
        for hospital in self._hospitals():
            hospital.digests.take(parameters=shared)
            hospital.take_global(shared)

    def take_calibration(self, values: torch.Tensor) -> None:
        """All take what calibrates the final model, float64 (1 + classes,)."""
        for hospital in self._hospitals():
            hospital.calibration = Calibration.of_tensor(values)
            hospital.digests.take(calibration=values)

    def evaluate(self, rank: int, number: int) -> None:
        """A hospital's evaluation on its own test patients after round `number`, of which nothing is opened."""
        each, began = self.hospitals[rank], time.monotonic()
        each.own = own_evaluation(each.hospital, number, "test").own
        each.spend("evaluate", began)

    def metrics(self, number: int) -> dict[str, dict[str, Any]]:
        """The line of each hospital about a round, by name."""
        lines = {}
        for each in self.hospitals.values():
            assert each.own is not None  # each has evaluated
            spent = {what: each.seconds.get(what, 0.0) for what in ("train", "aggregate", "evaluate")}
            steps = {} if each.steps is None else figures_of(each.steps)
            lines[each.hospital.name] = each.hospital.metrics(number, each.own, spent) | steps
            each.steps = None
            each.seconds.clear()
        return lines

    def privacy_ledgers(self) -> dict[str, bytes]:
        """The privacy ledger of each hospital as a file, by name; none of those that charged nothing."""
        paths = {each.hospital.name: each.hospital.ledger.path for each in self.hospitals.values()}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
