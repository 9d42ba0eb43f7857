"""preparation"""

from __future__ import annotations

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import broadcast
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import Attendance
from mpc_fl.federation.feature_statistics import decode_features, encode_features, plan_features
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.planning import (
    _all,
    calibrate_on_public_images,
    calibrate_own,
    features_run_name,
)
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import (
    flatten_buffers,
    flatten_parameters,
    load_flat_buffers,
    load_flat_parameters,
)
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain


def send_model(aggregator: Aggregator, links: Links, names: tuple[str, ...]) -> None:
    """Parameters, frozen statistics and normalisation of inputs, for hospitals that begin, join, or begin anew."""

    def send(name: str) -> None:
        links.send_tensor(name, "parameters", flatten_parameters(aggregator.model))
        links.send_tensor(name, "statistics", flatten_buffers(aggregator.model))
        if aggregator.normalisation is not None:
            links.send_tensor(name, "normalisation", aggregator.normalisation.tensor())

    broadcast(names, send)


def receive_model(hospital: Hospital, links: Links, normalised: bool) -> None:
    """A hospital's side of `send_model`, so that all start bit for bit alike."""
    parameters, buffers = flatten_parameters(hospital.model), flatten_buffers(hospital.model)
    load_flat_parameters(
        hospital.model, links.receive_tensor(AGGREGATOR, "parameters", torch.float32, parameters.shape)
    )
    load_flat_buffers(hospital.model, links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape))
    if normalised:
        values = links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, None)
        hospital.normalise(Normalisation.of_tensor(values))


def hospital_preparation(hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...]) -> None:
    """Sums over all hospitals before the first round, at a hospital: features if so configured, and the patients."""
    config, rules = hospital.config, _all(hospital.config, rules)
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan, ledger = plan_features(config), hospital.ledger
        event = plan.event()
        if event is not None:
            run = features_run_name(config)
            ledger.charge(event, run=run, round_number=0, budget=hospital.budget, reserve=True)
        encoded = encode_features(plan, hospital.train, hospital.noise_seed.derive("features"), config.runtime.threads)
        release = None if event is None else ledger.release
        contribute(domain, rules, AgreedSum(hospitals, ("features",), _FEATURES), encoded, release)
        values = domain.links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, (2, plan.features))
        hospital.normalise(Normalisation.of_tensor(values))
        buffers = flatten_buffers(hospital.model)
        load_flat_buffers(
            hospital.model, domain.links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape)
        )
    if config.aggregation.weighted:
        count = Private("number of patients", torch.tensor([hospital.train.patient_count], dtype=torch.int64))
        contribute(domain, rules, AgreedSum(hospitals, ("patients",), _PATIENTS), count)
    calibrate_own(hospital.model, hospital.train.inputs, config)


_FEATURES = Description("sum of features", "mean and deviation of the inputs")


_PATIENTS = Description("number of patients", "total weight of the mean")


def aggregator_preparation(aggregator: Aggregator, domain: SecretDomain, rules: Rules, attendance: Attendance) -> None:
    """Sums over all hospitals before the first round, at the aggregator."""
    config, rules, hospitals = aggregator.config, _all(aggregator.config, rules), attendance.members
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan = plan_features(config)
        agreed = AgreedSum(hospitals, ("features",), _FEATURES)
        _, total = collect(domain, rules, agreed, attendance.starts, torch.int64, (plan.length,))
        aggregator.normalisation = decode_features(plan, total).normalisation
        values = aggregator.normalisation.tensor()
        calibrate_on_public_images(aggregator.model, config, aggregator.normalisation)
        buffers = flatten_buffers(aggregator.model)

        def send(name: str) -> None:
            domain.links.send_tensor(name, "normalisation", values)
            domain.links.send_tensor(name, "statistics", buffers)

        broadcast(hospitals, send)
    aggregator.patients = config.federation.hospitals
    if config.aggregation.weighted:
        agreed = AgreedSum(hospitals, ("patients",), _PATIENTS)
        _, total = collect(domain, rules, agreed, attendance.starts, torch.int64, (1,))
        aggregator.patients = int(total)
        if not 0 < aggregator.patients <= config.federation.hospitals * config.aggregation.count_bound:
            raise ProtocolError("the opened number of patients cannot be", "a hospital does not follow the protocol")
    aggregator.weight_total = 1 << (aggregator.patients - 1).bit_length()
