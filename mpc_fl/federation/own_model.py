"""Whether the federation is worth it to one hospital: its model beside one trained on this hospital's own patients alone.

With `site.train_alone`, after the run has ended and all links are closed: a model with the same beginning is trained here, as
many rounds of as many steps with the same batches, learning rate and momentum, without noise and without anything of a server; both
models are then counted on this hospital's own test records. Nothing of it leaves the hospital: no message, no charge. To be tested
elsewhere the model would have to travel, with noise of its own that is charged to the same budget; so it is not
(docs/evidence.md).

The test records are the same for both models, so they are compared record by record: by the exact form of McNemar's test
(Psychometrika 1947), which asks whether, of the records that one model alone decides rightly, more are one's than chance makes so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.privacy import PrivacySection
from mpc_fl.federation.global_model import calibrate_on_public_images, initial_model
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.files import write_json
from mpc_fl.learning.device import on_device
from mpc_fl.learning.models.evaluation import Evaluation, evaluate_locally, predict
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.models.shares import sign_test
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.sampling import sampling_rate
from mpc_fl.links.party_links import site_directory
from mpc_fl.progress import Notify
from mpc_fl.roles import AGGREGATOR

log = logging.getLogger(__name__)

OWN_MODEL_FILE = "own_model.json"
# What only makes sense among several hospitals.
_OF_SERVERS = {
    "strategy": None,
    "proximal": 0.0,
    "server_learning_rate": None,
    "server_momentum": None,
    "server_adaptivity": None,
    "average_last": None,
    "ema_decay": None,
    "local_normalisation": False,
}


def alone_config(config: Config) -> Config:
    """The configuration by which a hospital trains alone: the same network and steps, without noise and servers."""
    privacy = PrivacySection().model_dump(mode="json") | {"mechanism": "none"}
    return config.with_values(
        privacy=privacy,
        training={**_OF_SERVERS, "keep_momentum": config.training.momentum > 0},
        evaluation={"noise_multiplier": None, "public_validation": False, "groups": {}},
        aggregation={"norm_check": False, "norm_bound": None},
        federation={"coordinator": AGGREGATOR, "founders": None, "admission": "all", "quorum": None},
        site={"leave_after": None, "training_processes": 1},
    )


def train_alone(hospital: Hospital, notify: Notify) -> nn.Module:
    """A model of this hospital's own training patients. Raises `ModelError` where training diverges."""
    config = alone_config(hospital.config)
    model = initial_model(config)
    calibrate_on_public_images(model, config, hospital.normalisation)
    rate, rounds = sampling_rate(config, hospital.train.patient_count), config.training.rounds
    velocity: torch.Tensor | None = None
    for number in range(1, rounds + 1):
        training = LocalTraining(config, None, rate, hospital.sampling_seed, velocity=velocity, device=hospital.device)
        local = train_locally(model, hospital.train, training, number, hospital.noise_seed.derive("alone", number))
        load_flat_parameters(model, flatten_parameters(model) + local.update)
        velocity = local.velocity
        notify("own model", number, rounds)
    return model


@dataclass(frozen=True)
class OwnComparison:
    """Both models on a hospital's own test records: their counts, and how many records one of them alone decides rightly."""

    federated: Evaluation
    alone: Evaluation
    federated_alone_right: int
    own_alone_right: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for this site's own file."""
        chance = sign_test(self.federated_alone_right, self.own_alone_right)
        return {
            "federated": self.federated.to_json(),
            "alone": self.alone.to_json(),
            "federated_alone_right": self.federated_alone_right,
            "own_alone_right": self.own_alone_right,
            "chance": float(f"{chance:.3g}"),
        }


def compare(hospital: Hospital, alone: nn.Module) -> OwnComparison:
    """Count both on the hospital's own test records, of which there is at least one."""
    labels, inputs = hospital.test.labels, hospital.test.inputs

    def chances_of(model: nn.Module) -> torch.Tensor:
        return predict(on_device(model, hospital.device.exact), inputs).double()

    logits, calibration = chances_of(hospital.model), hospital.calibration
    chances = torch.softmax(logits, dim=1) if calibration is None else calibration.probabilities(logits)
    decided = chances.argmax(dim=1) if calibration is None else calibration.decided(logits)
    own = torch.softmax(chances_of(alone), dim=1)
    rights, own_rights = decided == labels, own.argmax(dim=1) == labels
    return OwnComparison(
        evaluate_locally(chances, labels, decided),
        evaluate_locally(own, labels),
        int((rights & ~own_rights).sum()),
        int((own_rights & ~rights).sum()),
    )


def compare_own_model(hospital: Hospital, notify: Notify) -> None:
    """Where this site asks for it: train alone, compare, and write this site's own file."""
    if not hospital.config.site.train_alone:
        return
    if not len(hospital.test):
        log.warning("%s has no test records to compare its own model on", hospital.name)
        return
    found = compare(hospital, train_alone(hospital, notify))
    write_json(site_directory(hospital.config) / OWN_MODEL_FILE, found.to_json())
    log.info(
        "on %d own test records: accuracy %.1f %% of the federation's model, %.1f %% of one trained here alone",
        found.alone.records,
        100 * found.federated.accuracy,
        100 * found.alone.accuracy,
    )
