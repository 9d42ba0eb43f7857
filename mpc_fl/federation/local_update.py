"""What a round of training computes at a hospital, whoever leads it: local training, its update in the ring, what is kept of it.

The steps are numbered as in `hospital_round`, which has them under an aggregator; `peer_round` has them among peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.aggregation.rules import AgreedSum
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.federated_sgd import Steps
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.planning import describe_mean_update, headroom_of, run_name
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.dp_sgd import LocalRound, train_locally
from mpc_fl.progress import Notify


def charge_round(hospital: Hospital, number: int) -> None:
    """Write the round's release into the privacy ledger before anything that depends on patients is computed."""
    assert hospital.noise_multiplier is not None
    steps = hospital.config.training.local_steps
    if hospital.mechanism is not None:
        event = hospital.mechanism.event(hospital.sample_rate, steps)
    else:
        event = SubsampledGaussian(hospital.noise_multiplier, hospital.sample_rate, steps)
    run = run_name(hospital.config)
    hospital.ledger.charge(event, run=run, round_number=number, budget=hospital.budget, reserve=True)


@dataclass(frozen=True, repr=False)
class TrainedUpdate:
    """What local training gave: the round itself, its weighted update in the ring, and the seconds it took."""

    local: LocalRound
    encoded: Private[torch.Tensor]
    seconds: float


def trained_update(
    hospital: Hospital, set_phase: Callable[[str], None], plan: RoundPlan, notify: Notify
) -> TrainedUpdate:
    """Steps 2 and 3: local training, and the update as it enters the sum. Raises `HeadroomError` where it does not fit.

    `set_phase` is told when the second begins.
    """
    config, number = hospital.config, plan.number
    began = time.monotonic()
    local = train_locally(
        *hospital.trained(),
        hospital.local_training,
        round_number=number,
        noise_seed=hospital.noise_seed.derive("round", *plan.round_of),
        progress=progress_of(config, number, notify),
    )
    trained = time.monotonic() - began

    # 3. Encode in the ring; the weight is as secret as the update.
    set_phase(f"round {number} aggregation")
    count = hospital.weight if config.counts_patients else 1
    label, update = f"update of {hospital.name}", local.update[hospital.coordinates]
    encoded = Private(label, headroom_of(config).encode(update, count / plan.weight_total, label))
    return TrainedUpdate(local, encoded, trained)


def agreed_update(config: Config, plan: RoundPlan, digests: ModelDigests) -> AgreedSum:
    """The sum of step 4, as all its parties know it."""
    seen = sum_terms(config, plan.weight_total, digests)
    return AgreedSum(plan.hospitals, ("update", *plan.round_of), describe_mean_update(config, plan.number), seen)


def keep_trained(hospital: Hospital, local: LocalRound, shared: torch.Tensor) -> Steps:
    """Step 5 at a hospital: its own parameters as it trained them, beside the new global ones, float32 (S,)."""
    trained_model = flatten_parameters(hospital.model) + local.update
    load_flat_parameters(hospital.model, trained_model)
    hospital.take_global(shared)
    hospital.velocity = local.velocity
    return Steps(local.mean_loss, local.clipped_fraction, local.steps, local.method)


def figures_of(steps: Steps) -> dict[str, Any]:
    """What this site's own metrics say of its steps."""
    return {
        "loss": steps.mean_loss,
        "clipped_fraction": steps.clipped_fraction,
        "steps": steps.count,
        "method": steps.method,
    }


def progress_of(config: Config, number: int, notify: Notify) -> Callable[[int, int], None]:
    def step_done(done: int, total: int) -> None:
        notify("training", (number - 1) * total + done, config.training.rounds * total)

    return step_done
