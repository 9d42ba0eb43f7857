"""One federated round at the aggregator: it opens the sum over all who came in time, steps, and sends the new model.

The steps are numbered as in `hospital_round`. The aggregator learns the opened mean update, or with distributed noise
(`federated_sgd`) the mean gradient of every step, and sums of evaluation counts: nothing about one hospital.
"""

from __future__ import annotations

from mpc_fl.aggregation.quorum_sum import collect
from mpc_fl.aggregation.rules import Rules
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.distribution import send_global
from mpc_fl.federation.federated_sgd import aggregator_steps
from mpc_fl.federation.local_update import agreed_update
from mpc_fl.federation.planning import headroom_of, with_norm_check
from mpc_fl.federation.secure_evaluation import RoundOpened, aggregator_evaluation, evaluated_groups, log_accuracy
from mpc_fl.progress import Notify
from mpc_fl.sharing.opening import SecretDomain


def aggregator_round(
    aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> RoundOpened:
    """Steps 4 to 6 at the aggregator: which hospitals made the round, and the evaluations where they may be opened.

    Raises `QuorumError` when too few are left, `SumLostError` when the round has no result and is to be made anew.
    """
    config, links, number = aggregator.config, domain.links, plan.number
    links.set_phase(f"round {number} aggregation")
    size = len(aggregator.shared_parameters)
    check = with_norm_check(rules, config, aggregator.mechanism, size, plan.weight_total)
    if aggregator.mechanism is not None:
        hospitals = aggregator_steps(aggregator, domain, check, plan)
    else:
        hospitals = _average(aggregator, domain, check, plan)
    notify("aggregation", number, config.training.rounds)

    # 6. Sums of the hospitals' evaluation counts.
    hospitals, validation = aggregator_evaluation(aggregator, domain, rules, hospitals, plan, "validation")
    if validation is not None:
        aggregator.consider(number, validation)
    hospitals, evaluation = aggregator_evaluation(aggregator, domain, rules, hospitals, plan)
    notify("evaluation", number, config.training.rounds)
    if evaluation is not None:
        log_accuracy(number, evaluation)
    hospitals, about = evaluated_groups(aggregator, domain, rules, hospitals, plan, evaluation)
    return RoundOpened(hospitals, evaluation, validation, about)


def _average(aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan) -> tuple[str, ...]:
    """Steps 4 and 5 at the aggregator: open the weighted mean of the updates, step along it, send the new model."""
    config, shape = aggregator.config, aggregator.shared_parameters.shape
    agreed = agreed_update(config, plan, aggregator.digests)
    hospitals, total = collect(domain, rules, agreed, plan.starts, headroom_of(config).dtype, shape)
    shared = aggregator.step_along_sum(total, len(hospitals), plan.number)
    send_global(domain.links, aggregator.digests, hospitals, shared)
    return hospitals
