"""One federated round: the main path of training. Here is a hospital's side, `aggregator_round` is the aggregator's.

Round k, hospitals 0..n-1 and the aggregator, all of them CrypTen parties of one world:
  1. the aggregator says who takes part; all of them start from the same global model (`attendance`)
  2. each hospital charges its privacy ledger, then trains with differentially private SGD on its own patients
  3. each hospital encodes its weighted update in the ring; refused if it does not fit
  4. closed sum: the update is masked and sent, who is late is left out, the quorum is checked, the sum is opened to the
     aggregator alone (`quorum_sum`)
  5. the aggregator steps along the mean and sends the new global model
  6. all hospitals evaluate it on their own validation or test patients, where that is due; only the sum of the counts is opened
  7. all sign the round's openings and the new global model into the reveal ledger

Weights. With a privacy mechanism all hospitals weigh the same, and no number of patients is opened. Their steps divide by
the same public batch size and draw at the same public rate, so a hospital with more patients steps further: each patient
counts alike. Without a mechanism the total number of training patients N is opened once, over all hospitals. Hospital i's
weight is its number over N', the public power of two above N, so that the sum of weighted updates is a mean and needs no
headroom for counts. A round that somebody misses opens no sum of counts of its own: its difference to N would be the
absent hospital's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from mpc_fl.aggregation.quorum_sum import contribute
from mpc_fl.aggregation.rules import AgreedSum, Missed, Rules, missed_by
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import SumLostError
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.distribution import receive_global
from mpc_fl.federation.federated_sgd import Steps, hospital_steps
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import sum_terms
from mpc_fl.federation.planning import describe_mean_update, headroom_of, run_name, with_norm_check
from mpc_fl.federation.secure_evaluation import hospital_evaluation
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.dp_sgd import train_locally
from mpc_fl.progress import Notify
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)


def hospital_round(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> dict[str, Any] | Missed:
    """Steps 2 to 6 at a hospital. Returns this site's own metrics (they never leave it), or why there are none.

    Raises `PrivacyBudgetError` before training if the round would exceed the budget, `HeadroomError` if the update is
    NaN, infinite or too large, before anything is sent; `PeerLostError` when the aggregator is lost or late.
    """
    began, rounds, links, number = time.monotonic(), hospital.config.training.rounds, domain.links, plan.number
    links.set_phase(f"round {number} training")
    if hospital.noise_multiplier is not None:
        charge_round(hospital, number)
    take_steps = _gradient_steps if hospital.mechanism is not None else _local_steps
    size = len(hospital.shared_parameters)
    check = with_norm_check(rules, hospital.config, hospital.mechanism, size, plan.weight_total)
    taken = take_steps(hospital, domain, check, plan, notify)
    if isinstance(taken, str):
        return taken
    hospitals, steps, train_seconds = taken
    aggregate_seconds = time.monotonic() - began - train_seconds
    log.info("round %d: trained in %.1f s, aggregated in %.1f s", number, train_seconds, aggregate_seconds)
    notify("aggregation", number, rounds)

    # 6. Evaluate on the hospital's own validation and test patients; only sums over hospitals are opened.
    evaluation_began = time.monotonic()
    own = hospital_evaluation(hospital, domain, rules, hospitals, plan)
    if own is None:
        return "left out"
    notify("evaluation", number, rounds)
    evaluate_seconds = time.monotonic() - evaluation_began
    seconds = {"train": train_seconds, "aggregate": aggregate_seconds, "evaluate": evaluate_seconds}
    trained = {
        "loss": steps.mean_loss,
        "clipped_fraction": steps.clipped_fraction,
        "steps": steps.count,
        "method": steps.method,
    }
    return hospital.metrics(number, own, seconds) | trained


Taken = tuple[tuple[str, ...], Steps, float]


def _local_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Steps 2 to 5: local training, then one closed sum of the weighted updates."""
    config, links, number = hospital.config, domain.links, plan.number
    began = time.monotonic()
    local = train_locally(
        *hospital.trained(),
        hospital.local_training,
        round_number=number,
        noise_seed=hospital.noise_seed.derive("round", *plan.round_of),
        progress=_progress(config, number, notify),
    )
    trained = time.monotonic() - began

    # 3. Encode in the ring; the weight is as secret as the update.
    links.set_phase(f"round {number} aggregation")
    count = hospital.weight if config.counts_patients else 1
    label, update = f"update of {hospital.name}", local.update[hospital.coordinates]
    encoded = Private(label, headroom_of(config).encode(update, count / plan.weight_total, label))

    # 4. and 5. `contribute` masks the update for its closed sum, which is opened to the aggregator alone; the aggregator
    # sends the new global model.
    seen = sum_terms(config, plan.weight_total, hospital.digests)
    agreed = AgreedSum(plan.hospitals, ("update", *plan.round_of), describe_mean_update(config, number), seen)
    try:
        admitted = contribute(domain, rules, agreed, encoded, hospital.releasing(number))
    except SumLostError as error:
        log.warning("%s", error)
        return missed_by(hospital.name, error)
    del encoded
    if hospital.name not in admitted:
        return "left out"
    shared = receive_global(links, hospital.digests, len(hospital.shared_parameters))
    trained_model = flatten_parameters(hospital.model) + local.update
    load_flat_parameters(hospital.model, trained_model)
    hospital.take_global(shared)
    hospital.velocity = local.velocity
    return admitted, Steps(local.mean_loss, local.clipped_fraction, local.steps, local.method), trained


def _gradient_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Distributed noise: steps 2 to 5 for every single step, see `federated_sgd`."""
    links, phase = domain.links, f"round {plan.number} training"
    before = links.seconds_of(phase)
    taken = hospital_steps(hospital, domain, rules, plan, _progress(hospital.config, plan.number, notify))
    return taken if isinstance(taken, str) else (*taken, links.seconds_of(phase) - before)


def _progress(config: Config, number: int, notify: Notify) -> Callable[[int, int], None]:
    def step_done(done: int, total: int) -> None:
        notify("training", (number - 1) * total + done, config.training.rounds * total)

    return step_done


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
