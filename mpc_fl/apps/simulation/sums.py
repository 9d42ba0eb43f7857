"""The sums of a simulated round, as the aggregator and every hospital know them alike before they begin. Pure.

A `SumRequest` says which sum is meant; `agreed_of` gives what its parties agree on, with the model that the caller itself has
(`ModelDigests`): so the transcripts of two that have different models differ, and their masks do not cancel, as between real
parties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mpc_fl.aggregation.rules import AgreedSum, Rules
from mpc_fl.config.config import Config
from mpc_fl.config.evaluation import Evaluated
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.federated_sgd import agreed_gradient
from mpc_fl.federation.final_round import calibration_sum
from mpc_fl.federation.local_update import agreed_update
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.preparation import FEATURES, PATIENTS
from mpc_fl.federation.secure_evaluation import agreed_evaluation, evaluation_rules

Kind = Literal["features", "patients", "update", "gradient", "validation", "test", "calibration"]
_ONCE = {"features": FEATURES, "patients": PATIENTS}


@dataclass(frozen=True)
class SumRequest:
    """One sum: of what, in which round, and of a gradient in which step of it."""

    kind: Kind
    plan: RoundPlan
    step: int = 0

    @property
    def whom(self) -> Evaluated:
        """Whose patients a sum of evaluation or calibration is about."""
        return "test" if self.kind == "test" else "validation"


@dataclass(frozen=True)
class KnownKeys:
    """SHA-256 of the X25519 key of each hospital, in hex, by name: what a transcript asks of links."""

    fingerprints: Mapping[str, str]

    @classmethod
    def of(cls, public_keys: Mapping[str, bytes]) -> KnownKeys:
        """Those of these keys, as links find them (`links.keys.PairwiseKeys.fingerprint`)."""
        return cls({name: hashlib.sha256(key).hexdigest() for name, key in public_keys.items()})

    def key_fingerprint(self, party: str) -> str:
        """That of one hospital."""
        return self.fingerprints[party]


def agreed_of(config: Config, request: SumRequest, digests: ModelDigests) -> AgreedSum:
    """The sum as whoever has this model knows it."""
    plan = request.plan
    if request.kind == "update":
        return agreed_update(config, plan, digests)
    if request.kind == "gradient":
        return agreed_gradient(config, plan.hospitals, plan, request.step, digests)
    if request.kind in _ONCE:
        about = _ONCE[request.kind]
        return AgreedSum(plan.hospitals, (about.what, *plan.round_of), about, sum_terms(config, 1, digests))
    if request.kind == "calibration":
        return calibration_sum(plan, plan.hospitals, config, sum_terms(config, plan.weight_total, digests))
    return agreed_evaluation(config, plan.hospitals, plan, request.whom, digests)


def rules_of(config: Config, rules: Rules, request: SumRequest) -> Rules:
    """The rules of this sum in a run with these `rules`."""
    if request.kind in ("validation", "test", "calibration"):
        return evaluation_rules(config, rules, request.whom)
    return rules
