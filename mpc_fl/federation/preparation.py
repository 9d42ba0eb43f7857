"""Sums that are opened once, before the first round: of features if so configured, and of patients.

The first gives the common normalisation of inputs (`feature_statistics`), the second the total weight of the mean. Like all sums
they are opened over the hospitals that are there, of which the quorum is needed. Where they are exact (mechanism `none`), the
difference of two of them would be what one hospital has: a party that has recorded one takes part in another over the same
hospitals alone (`AgreedSum.only`), also after it has started again.

A hospital that comes later takes the normalisation with the model. It is not in the number of patients: so that the sum of
weights stays at most 1, those counted then weigh at most 1/2 together, and each of the others its part of the rest.
"""

from __future__ import annotations

import functools
import logging

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Missed, Rules, missed_by
from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ProtocolError, SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.feature_statistics import FeaturePlan, decode_features, encode_features, plan_features
from mpc_fl.federation.global_model import calibrate_on_public_images, calibrate_own
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.planning import features_run_name
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import flatten_buffers, load_flat_buffers
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

Ledger = RevealLedger | OpeningRecord  # the record of the domain, which is also asked

FEATURES = Description("sum of features", "mean and deviation of the inputs")
PATIENTS = Description("number of patients", "total weight of the mean")


def _begun_over(ledger: Ledger, why: str) -> tuple[str, ...] | None:
    """The hospitals over which this party began to open a sum; `None` when it has not."""
    among = ledger.begun_among(why)
    return None if among is None else tuple(name for name in among if name != AGGREGATOR)


def agreed_once(
    config: Config,
    ledger: Ledger,
    hospitals: tuple[str, ...],
    plan: RoundPlan,
    about: Description,
    digests: ModelDigests,
) -> AgreedSum:
    """A sum that is opened once, as all its parties know it, with the only hospitals over which this one may open it."""
    only = _begun_over(ledger, about.why) if config.privacy.mechanism == "none" else None
    return AgreedSum(hospitals, (about.what, *plan.round_of), about, sum_terms(config, 1, digests), only)


def is_counted(config: Config, plan: RoundPlan) -> bool:
    """Whether this plan begins before patients were counted, where they are."""
    return config.counts_patients and plan.weight_total == 1


# ---- at a hospital -----------------------------------------------------------------------------------------------------


def hospital_preparation(
    hospital: Hospital, domain: SecretDomain, ledger: Ledger, rules: Rules, plan: RoundPlan
) -> tuple[str, ...] | Missed:
    """Sums before the first round, at a hospital. Returns the hospitals that are in them, or why it has no result."""
    config, hospitals = hospital.config, plan.hospitals
    domain.links.set_phase("preparation")
    try:
        if config.data.normalise == "secure" and not plan.normalised:
            hospitals = _sum_features(hospital, domain, ledger, rules, plan)
        if hospital.name in hospitals and is_counted(config, plan):
            agreed = agreed_once(config, ledger, hospitals, plan, PATIENTS, hospital.digests)
            hospitals = contribute(domain, rules, agreed, own_count(hospital), hospital.releasing(0))
    except SumLostError as error:
        log.warning("%s", error)
        return missed_by(hospital.name, error)
    if hospital.name not in hospitals:
        return "left out"
    calibrate_own(hospital.model, hospital.train.inputs, config)
    return hospitals


def own_count(hospital: Hospital) -> Private[torch.Tensor]:
    """Its number of training patients, int64 (1,). Opened with mechanism none alone: what it shows of them is exact."""
    return Private("number of patients", torch.tensor([hospital.train.patient_count], dtype=torch.int64))


def own_features(hospital: Hospital, features: FeaturePlan, plan: RoundPlan) -> Private[torch.Tensor]:
    """Its summand of the features, charged where it carries noise. Raises what `encode_features` raises."""
    config, event = hospital.config, features.event()
    if event is not None:
        run = features_run_name(config)
        hospital.ledger.charge(event, run=run, round_number=0, budget=hospital.budget, reserve=True)
    seed = hospital.noise_seed.derive("features", *plan.round_of)  # fresh for every attempt
    return encode_features(features, hospital.train, seed, config.runtime.threads)


def _sum_features(
    hospital: Hospital, domain: SecretDomain, ledger: Ledger, rules: Rules, plan: RoundPlan
) -> tuple[str, ...]:
    config, links, features = hospital.config, domain.links, plan_features(hospital.config)
    encoded = own_features(hospital, features, plan)
    agreed = agreed_once(config, ledger, plan.hospitals, plan, FEATURES, hospital.digests)
    hospitals = contribute(domain, rules, agreed, encoded, hospital.releasing(0))
    if hospital.name in hospitals:
        values = links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, (2, features.constants))
        buffers = flatten_buffers(hospital.model)
        buffers = links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape)
        take_normalisation(hospital, values, buffers)
    return hospitals


def take_normalisation(hospital: Hospital, values: torch.Tensor, buffers: torch.Tensor) -> None:
    """At a hospital: the normalisation that the sum of features gave, float64 (2, constants), and the statistics of the model
    that go with it, float32 (B,)."""
    hospital.normalise(Normalisation.of_tensor(values, hospital.config))
    load_flat_buffers(hospital.model, buffers)
    hospital.digests.take(statistics=buffers, normalisation=values)


def heaviest_weight(config: Config, ledger: Ledger, name: str, weight_total: int) -> int | None:
    """What a hospital may weigh at most where it is not in the opened number of patients; `None` where it is."""
    counted = _begun_over(ledger, PATIENTS.why) or ()
    if not config.counts_patients or name in counted:
        return None
    return weight_total // (2 * (config.federation.hospitals - len(counted)))


# ---- at the aggregator -------------------------------------------------------------------------------------------------


def aggregator_preparation(
    aggregator: Aggregator, domain: SecretDomain, ledger: Ledger, rules: Rules, plan: RoundPlan
) -> tuple[str, ...]:
    """Sums before the first round, at the aggregator; what an attempt before has opened is not opened again.

    Returns the hospitals that are in them. Raises `QuorumError` when too few are left, `SumLostError` when one is lost.
    """
    config, hospitals = aggregator.config, plan.hospitals
    agree = functools.partial(agreed_once, config, ledger)
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure" and not plan.normalised:
        features = plan_features(config)
        agreed = agree(hospitals, plan, FEATURES, aggregator.digests)
        hospitals, total = collect(domain, rules, agreed, plan.starts, torch.int64, (features.length,))
        values, buffers = take_features(aggregator, features, total)

        def send(name: str) -> None:
            domain.links.send_tensor(name, "normalisation", values)
            domain.links.send_tensor(name, "statistics", buffers)

        broadcast(hospitals, send)
    if is_counted(config, plan):
        agreed = agree(hospitals, plan, PATIENTS, aggregator.digests)
        hospitals, total = collect(domain, rules, agreed, plan.starts, torch.int64, (1,))
        take_patients(aggregator, int(total), len(hospitals))
    elif not config.counts_patients:
        take_patients(aggregator, config.federation.hospitals, config.federation.hospitals)
    return hospitals


def take_features(
    aggregator: Aggregator, features: FeaturePlan, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalisation that the opened sum gives, and the statistics of the model that go with it; both as they are sent."""
    aggregator.normalisation = decode_features(features, total).normalisation
    values = aggregator.normalisation.tensor()
    calibrate_on_public_images(aggregator.model, aggregator.config, aggregator.normalisation)
    buffers = flatten_buffers(aggregator.model)
    aggregator.digests.take(statistics=buffers, normalisation=values)
    return values, buffers


def take_patients(aggregator: Aggregator, patients: int, counted: int) -> None:
    """The opened number of patients of so many hospitals, or one for each where none is opened."""
    federation = aggregator.config.federation
    if not 0 < patients <= counted * aggregator.config.aggregation.count_bound:
        raise ProtocolError("the opened number of patients cannot be", "a hospital does not follow the protocol")
    aggregator.patients, aggregator.counted = patients, counted
    aggregator.weight_total = 1 << ((patients if counted == federation.hospitals else 2 * patients) - 1).bit_length()
