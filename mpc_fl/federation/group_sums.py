"""The two sums over all hospitals by which groups of test patients are evaluated, after the final model's own evaluation.

    1. sizes: noised numbers of patients of all groups are opened (`group_evaluation`)
    2. with an aggregator it tells them to all, and each hospital decides by itself which groups are shown; among peers each
       has opened them itself. What was told is bound into the transcript of the next sum: hospitals that were told
       different numbers have masks that do not cancel
    3. counts of the groups that are shown are opened, and named in the record of the opening; where no group is shown there is
       no such sum

That the aggregator has read the numbers rightly is taken from it, like every opened mean. Rules of the sums are those of
evaluation: exact counts over all hospitals or not at all. Where either sum cannot be opened the round has its result without
groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.words import next_word, say
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import Scalar
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import SAME_VERSION, ProtocolError, QuorumError, SumLostError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.group_evaluation import (
    Cell,
    GroupPlan,
    GroupsOpened,
    OwnDecisions,
    decode_groups,
    decode_sizes,
    encode_exact,
    encode_noised,
    encode_sizes,
    plan_groups,
    shown_cells,
)
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests, sum_terms
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.federation.planning import groups_run_name
from mpc_fl.learning.models.evaluation import Evaluation
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

Release = Callable[[], None]
Summand = tuple[Private[torch.Tensor], Release | None]


def planned_groups(config: Config) -> GroupPlan:
    """The plan of a run that has groups."""
    planned = plan_groups(config)
    assert planned is not None
    return planned


# ---- the sums, as all their parties know them --------------------------------------------------------------------------


def agreed_sizes(config: Config, hospitals: tuple[str, ...], plan: RoundPlan, digests: ModelDigests) -> AgreedSum:
    """The sum of numbers of patients."""
    by = ", ".join(config.evaluation.groups.attributes)
    about = Description("noised numbers of patients", f"round {plan.number}: sizes of groups by {by}", _privacy(config))
    seen = sum_terms(config, plan.weight_total, digests)
    return AgreedSum(hospitals, ("sizes of groups", *plan.round_of), about, seen)


def agreed_counts(
    config: Config, hospitals: tuple[str, ...], plan: RoundPlan, digests: ModelDigests, sizes: torch.Tensor
) -> AgreedSum | None:
    """The sum of counts that follows from the opened `sizes`, int64 (G,) over these hospitals; None where no group is shown."""
    planned = planned_groups(config)
    cells = cells_by(planned, sizes, len(hospitals))
    if not cells:
        return None
    named = {attribute: list[str]() for attribute in config.evaluation.groups.attributes}
    for cell in cells:
        named[cell.attribute].append(planned.name(cell))
    shown = "; ".join(f"{attribute} {', '.join(groups)}" for attribute, groups in named.items() if groups)
    exact = planned.noise is None
    what = "sum of evaluation counts by group" if exact else "sum of confusion matrices by group"
    noised = "" if exact else "noised "
    about = Description(
        what, f"round {plan.number}: {noised}counts of groups: {shown}", None if exact else _privacy(config)
    )
    seen = sum_terms(config, plan.weight_total, digests) | {"sizes of groups": tensor_digest(sizes)}
    return AgreedSum(hospitals, ("counts of groups", *plan.round_of), about, seen)


def cells_by(planned: GroupPlan, sizes: torch.Tensor, hospitals: int) -> tuple[Cell, ...]:
    """The cells that are shown by sizes opened over so many hospitals, int64 (G,). Raises `ProtocolError`."""
    return shown_cells(planned, decode_sizes(planned, sizes, hospitals))


def _privacy(config: Config) -> dict[str, Scalar]:
    noise = config.evaluation_noise("test")
    unit = f"test {config.data.counted_unit}"
    if noise is None:  # charged to nobody, as exact counts are
        return {"mechanism": "none", "unit": unit, "noise multiplier": config.evaluation.group_size_noise}
    return {"mechanism": config.privacy.mechanism, "unit": unit, "noise multiplier": noise}


# ---- at a hospital -----------------------------------------------------------------------------------------------------


def own_sizes(hospital: Hospital, plan: RoundPlan) -> Summand:
    """Its summand of the sizes, charged where counts are noised, and what enters the privacy ledger when it leaves."""
    planned, release = planned_groups(hospital.config), _charged(hospital, plan)
    seed = hospital.noise_seed.derive("sizes of groups", *plan.round_of)
    return encode_sizes(planned, hospital.test, seed, hospital.config.runtime.threads), release


def own_counts(hospital: Hospital, plan: RoundPlan, cells: tuple[Cell, ...], found: OwnDecisions) -> Summand:
    """The same of the counts of cells."""
    config, planned = hospital.config, planned_groups(hospital.config)
    if planned.noise is None:
        return encode_exact(cells, hospital.test, found, config.aggregation.count_bound), None
    release, seed = _charged(hospital, plan), hospital.noise_seed.derive("counts of groups", *plan.round_of)
    return encode_noised(planned, cells, hospital.test, found, seed, config.runtime.threads), release


def _charged(hospital: Hospital, plan: RoundPlan) -> Release | None:
    event = planned_groups(hospital.config).event()
    if event is None:
        return None
    run, budget = groups_run_name(hospital.config), hospital.budget
    hospital.ledger.charge(event, run=run, round_number=plan.number, budget=budget, reserve=True)
    return hospital.ledger.release


def hospital_groups(
    hospital: Hospital,
    domain: SecretDomain,
    rules: Rules,
    hospitals: tuple[str, ...],
    plan: RoundPlan,
    found: OwnDecisions,
) -> bool:
    """A hospital's part, by the `rules` of evaluation; False where it was left out of what the others opened.

    Raises `PrivacyBudgetError` before anything is sent where a noised sum would exceed the budget, `ProtocolError` for sizes
    that cannot be.
    """
    config, name = hospital.config, hospital.name
    domain.links.set_phase(f"round {plan.number} groups")
    if next_word(domain.links, AGGREGATOR, ("groups", "skip"))["word"] == "skip":
        return True
    try:
        agreed = agreed_sizes(config, hospitals, plan, hospital.digests)
        admitted = contribute(domain, rules, agreed, *own_sizes(hospital, plan))
        if not admitted or name not in admitted:  # nobody: nothing was opened
            return not admitted
        sizes = _told(next_word(domain.links, AGGREGATOR, ("sizes",)).get("sizes"), planned_groups(config))
        counted = agreed_counts(config, admitted, plan, hospital.digests, sizes)
        if counted is None:
            return True
        cells = cells_by(planned_groups(config), sizes, len(admitted))
        admitted = contribute(domain, rules, counted, *own_counts(hospital, plan, cells, found))
    except SumLostError as error:
        log.warning("%s", error)
        return True
    return not admitted or name in admitted


def _told(sizes: Any, planned: GroupPlan) -> torch.Tensor:
    """Sizes as the aggregator told them, int64 (G,). Raises `ProtocolError` for what cannot be."""
    bound = planned.sizes.largest_sum
    whole = isinstance(sizes, list) and all(type(size) is int and abs(size) <= bound for size in sizes)
    if not whole or len(sizes) != planned.length:
        raise ProtocolError(f"{AGGREGATOR} told no sizes of groups", SAME_VERSION)
    return torch.tensor(sizes, dtype=torch.int64)


# ---- at the aggregator -------------------------------------------------------------------------------------------------


def aggregator_groups(
    aggregator: Aggregator,
    domain: SecretDomain,
    rules: Rules,
    hospitals: tuple[str, ...],
    plan: RoundPlan,
    evaluation: Evaluation | NoisedEvaluation | None,
) -> tuple[tuple[str, ...], GroupsOpened | None]:
    """The aggregator's part, after `evaluation` was opened, None where it was not: who goes on, and what was opened of groups."""
    config, links = aggregator.config, domain.links
    links.set_phase(f"round {plan.number} groups")
    if evaluation is None or len(hospitals) < rules.smallest:
        say(links, hospitals, "skip")
        return hospitals, None
    say(links, hospitals, "groups")
    planned = planned_groups(config)
    try:
        agreed = agreed_sizes(config, hospitals, plan, aggregator.digests)
        hospitals, sizes = collect(domain, rules, agreed, plan.starts, torch.int64, (planned.length,))
        decode_sizes(planned, sizes, len(hospitals))
        say(links, hospitals, "sizes", sizes=sizes.tolist())
        counted = agreed_counts(config, hospitals, plan, aggregator.digests, sizes)
        if counted is None:
            return hospitals, GroupsOpened(planned, (), ())
        cells = cells_by(planned, sizes, len(hospitals))
        length = planned.counts_length(cells)
        hospitals, total = collect(domain, rules, counted, plan.starts, torch.int64, (length,))
    except QuorumError as error:
        log.warning("%s", error)
        say(links, hospitals, "fixed", hospitals=[])
        return hospitals, None
    except SumLostError as error:
        log.warning("%s", error)
        return hospitals, None
    return hospitals, opened_groups(config, cells, total, len(hospitals), evaluation)


def opened_groups(
    config: Config,
    cells: tuple[Cell, ...],
    total: torch.Tensor,
    hospitals: int,
    evaluation: Evaluation | NoisedEvaluation,
) -> GroupsOpened:
    """What the opened sum of counts over so many hospitals says. Raises `ProtocolError` for one that cannot be."""
    whole = evaluation if isinstance(evaluation, Evaluation) and not config.federation.evaluate_incomplete else None
    return decode_groups(planned_groups(config), cells, total, hospitals, whole)
