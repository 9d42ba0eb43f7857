"""Sums over all hospitals that are opened once, before the first round: of features if so configured, and of patients.

The first gives the common normalisation of inputs (`feature_statistics`), the second the total weight of the mean. Both are
opened over all hospitals or not at all.
"""

from __future__ import annotations

import functools

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import broadcast
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import Attendance
from mpc_fl.federation.feature_statistics import decode_features, encode_features, plan_features
from mpc_fl.federation.global_model import calibrate_on_public_images, calibrate_own
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import sum_terms
from mpc_fl.federation.planning import features_run_name, over_all_hospitals
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import flatten_buffers, load_flat_buffers
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

_FEATURES = Description("sum of features", "mean and deviation of the inputs")
_PATIENTS = Description("number of patients", "total weight of the mean")


def hospital_preparation(hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...]) -> None:
    """Sums over all hospitals before the first round, at a hospital: features if so configured, and the patients."""
    config, rules = hospital.config, over_all_hospitals(hospital.config, rules)
    seen = functools.partial(sum_terms, config, 1, hospital.digests)
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan, ledger = plan_features(config), hospital.ledger
        event = plan.event()
        if event is not None:
            run = features_run_name(config)
            ledger.charge(event, run=run, round_number=0, budget=hospital.budget, reserve=True)
        encoded = encode_features(plan, hospital.train, hospital.noise_seed.derive("features"), config.runtime.threads)
        agreed = AgreedSum(hospitals, ("features",), _FEATURES, seen())
        _require_all(hospitals, contribute(domain, rules, agreed, encoded, hospital.releasing(0)))
        values = domain.links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, (2, plan.constants))
        hospital.normalise(Normalisation.of_tensor(values, config))
        buffers = flatten_buffers(hospital.model)
        buffers = domain.links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape)
        load_flat_buffers(hospital.model, buffers)
        hospital.digests.take(statistics=buffers, normalisation=values)
    if config.counts_patients:
        count = Private("number of patients", torch.tensor([hospital.train.patient_count], dtype=torch.int64))
        # Opened with mechanism none alone: what it shows of the patients is exact.
        agreed = AgreedSum(hospitals, ("patients",), _PATIENTS, seen())
        _require_all(hospitals, contribute(domain, rules, agreed, count, hospital.releasing(0)))
    calibrate_own(hospital.model, hospital.train.inputs, config)


def _require_all(hospitals: tuple[str, ...], admitted: tuple[str, ...]) -> None:
    if admitted != hospitals:
        raise ProtocolError(
            f"{AGGREGATOR} left a hospital out of a sum over all of them",
            "it does not follow the protocol; start again",
        )


def aggregator_preparation(aggregator: Aggregator, domain: SecretDomain, rules: Rules, attendance: Attendance) -> None:
    """Sums over all hospitals before the first round, at the aggregator."""
    config, rules, hospitals = aggregator.config, over_all_hospitals(aggregator.config, rules), attendance.members
    seen = functools.partial(sum_terms, config, 1, aggregator.digests)
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan = plan_features(config)
        agreed = AgreedSum(hospitals, ("features",), _FEATURES, seen())
        _, total = collect(domain, rules, agreed, attendance.starts, torch.int64, (plan.length,))
        aggregator.normalisation = decode_features(plan, total).normalisation
        values = aggregator.normalisation.tensor()
        calibrate_on_public_images(aggregator.model, config, aggregator.normalisation)
        buffers = flatten_buffers(aggregator.model)
        aggregator.digests.take(statistics=buffers, normalisation=values)

        def send(name: str) -> None:
            domain.links.send_tensor(name, "normalisation", values)
            domain.links.send_tensor(name, "statistics", buffers)

        broadcast(hospitals, send)
    aggregator.patients = config.federation.hospitals
    if config.counts_patients:
        agreed = AgreedSum(hospitals, ("patients",), _PATIENTS, seen())
        _, total = collect(domain, rules, agreed, attendance.starts, torch.int64, (1,))
        aggregator.patients = int(total)
        if not 0 < aggregator.patients <= config.federation.hospitals * config.aggregation.count_bound:
            raise ProtocolError("the opened number of patients cannot be", "a hospital does not follow the protocol")
    aggregator.weight_total = 1 << (aggregator.patients - 1).bit_length()
