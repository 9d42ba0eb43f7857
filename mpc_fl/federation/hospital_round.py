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
from typing import Any

from mpc_fl.aggregation.quorum_sum import contribute
from mpc_fl.aggregation.rules import Missed, Rules, missed_by
from mpc_fl.errors import SumLostError
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.distribution import receive_global
from mpc_fl.federation.federated_sgd import Steps, hospital_steps
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.local_update import (
    agreed_update,
    charge_round,
    figures_of,
    keep_trained,
    progress_of,
    trained_update,
)
from mpc_fl.federation.planning import with_norm_check
from mpc_fl.federation.secure_evaluation import hospital_evaluation
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
    return hospital.metrics(number, own, seconds) | figures_of(steps)


Taken = tuple[tuple[str, ...], Steps, float]


def _local_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Steps 2 to 5: local training, then one closed sum of the weighted updates."""
    links = domain.links
    trained = trained_update(hospital, links.set_phase, plan, notify)
    local, encoded, seconds = trained.local, trained.encoded, trained.seconds
    del trained

    # 4. and 5. `contribute` masks the update for its closed sum, which is opened to the aggregator alone; the aggregator
    # sends the new global model.
    agreed = agreed_update(hospital.config, plan, hospital.digests)
    try:
        admitted = contribute(domain, rules, agreed, encoded, hospital.releasing(plan.number))
    except SumLostError as error:
        log.warning("%s", error)
        return missed_by(hospital.name, error)
    del encoded
    if hospital.name not in admitted:
        return "left out"
    shared = receive_global(links, hospital.digests, len(hospital.shared_parameters))
    return admitted, keep_trained(hospital, local, shared), seconds


def _gradient_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Distributed noise: steps 2 to 5 for every single step, see `federated_sgd`."""
    links, phase = domain.links, f"round {plan.number} training"
    before = links.seconds_of(phase)
    taken = hospital_steps(hospital, domain, rules, plan, progress_of(hospital.config, plan.number, notify))
    return taken if isinstance(taken, str) else (*taken, links.seconds_of(phase) - before)
