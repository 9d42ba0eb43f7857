"""Closed sums over links: who contributes, who is left out, and when a sum is opened.

One sum, hospitals U and the aggregator (`contribute` at a hospital, `collect` at the aggregator), after `closed_sum`:
  1. hospitals say that they are ready; the aggregator takes their summands, two at a time so that it never holds more,
     until the deadline of the sum
  2. with a check: its words "check" start the check of the norms of what it holds (`norm_check`)
  3. its word "fixed" names V, those who came in time and passed; fewer than the quorum end the run (`QuorumError`)
  4. the hospitals of V give their keys, the aggregator opens the sum over V
If a hospital is lost during the check, the word "again" names who is left, and all begin at 1 with fresh masks: nothing was
opened. If keys are lost for ever in step 4, the sum is void (`SumLostError` at the aggregator): V was fixed and may not
be fixed anew, so its summands are made anew.

All words of the aggregator to one hospital come in one order under one tag (`words`), so that a hospital which was late
finds in them what it has missed.

Who learns what. The aggregator learns the sum over V and, with a check, one bit per hospital; the hospitals learn U and V.

Rounds and bytes. Without a check: "ready", "send", summand, "fixed", keys, one after the other. Each hospital sends k/8
bytes per element and 32 for every key, the words are some hundred bytes. A check adds what `norm_check` states.

Security. That of `closed_sum`, against semi-honest parties. A hospital sees to it that V is a part of U, holds itself, and
is as large as the rules say, before it gives keys; it does not see whether all were told the same U and V.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpc_fl.aggregation.rules import AgreedSum, Rules, require_quorum
from mpc_fl.aggregation.words import names_in, next_word, say
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.crypto.stream_cipher import Label
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks, SumPlan
from mpc_fl.sharing.opening import FixedSum, SecretDomain, open_to

log = logging.getLogger(__name__)

_AT_A_TIME = 2


def _plan(rules: Rules, hospitals: tuple[str, ...], label: tuple[Label, ...], attempt: int) -> SumPlan:
    return SumPlan(hospitals, rules.opener, (*label, attempt), min(rules.closing, len(hospitals) - 1))


def contribute(
    domain: SecretDomain,
    rules: Rules,
    agreed: AgreedSum,
    encoded: Private[torch.Tensor],
    before_keys: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """At a hospital of U: add `encoded` (int32 or int64, of any shape) to the sum; returns V, perhaps without this hospital.

    Nobody learns the summand; the aggregator learns the sum over V. `before_keys` is called when nothing but the keys is
    left to send: from then on the summand counts as released. Raises `PeerLostError` when the aggregator is lost or late,
    `ProtocolError` for a V that may not be opened.
    """
    links, me, hospitals = domain.links, domain.links.name, agreed.hospitals
    shape = encoded.inside_protocol().shape
    for attempt in range(len(hospitals)):
        plan = _plan(rules, hospitals, agreed.label, attempt)
        masks = SummandMasks(plan, me, shape, domain.sum_seed)
        # Only a check can make the sum begin again, and need the summand without these masks.
        summand = masks.masked(encoded, in_place=rules.check is None)
        links.send_object(plan.opener, f"ready {plan.name}", {})
        word = next_word(links, plan.opener, ("send", "check", "fixed", "again"))
        if word["word"] == "send":
            links.send_tensor(plan.opener, f"summand {plan.name}", summand)
            del summand
            word = next_word(links, plan.opener, ("check", "fixed", "again"))
        while word["word"] == "check":
            _take_part_in_check(domain, rules, masks, word)
            word = next_word(links, plan.opener, ("check", "fixed", "again"))
        hospitals = names_in(word, "hospitals")
        if word["word"] == "fixed":
            break
        if me not in hospitals:
            return hospitals
    else:
        raise ProtocolError("a sum began again too often", SAME_VERSION)
    about = agreed.about
    if me in hospitals:
        if before_keys is not None:
            before_keys()
        fixed = FixedSum(masks, hospitals, rules.smallest, 0)
        open_to(domain, Shared(about.what, fixed), [rules.opener], about.why, about.privacy)
    else:
        log.warning("this hospital was left out of '%s': it was late, or its update too large", about.why)
    return hospitals


def _take_part_in_check(domain: SecretDomain, rules: Rules, masks: SummandMasks, word: Mapping[str, Any]) -> None:
    """Step 2 at a hospital. Another one that is lost ends the check, not the sum: the aggregator says how it goes on."""
    opener = masks.plan.opener
    if rules.check is None:
        raise ProtocolError(f"{opener} began a check that was not agreed", "give all parties one file")
    try:
        rules.check.at_hospital(domain, masks, word)
    except PeerLostError as error:
        if error.peer == opener:
            raise
        log.warning("%s; waiting for the sum to begin again", error)


def collect(
    domain: SecretDomain,
    rules: Rules,
    agreed: AgreedSum,
    starts: Mapping[str, str],
    dtype: torch.dtype,
    shape: Sequence[int],
) -> tuple[tuple[str, ...], torch.Tensor]:
    """At the aggregator: V, and the opened sum over V as ring elements of `dtype` (int32 or int64) and `shape`.

    `starts` says by key fingerprints which start of each hospital is meant: one that has started again since is left
    out. Raises `QuorumError` when too few are left, `SumLostError` when the sum can no longer be opened.
    """
    links, about, hospitals = domain.links, agreed.about, agreed.hospitals
    for attempt in range(len(hospitals)):
        plan = _plan(rules, hospitals, agreed.label, attempt)
        closed = ClosedSum(plan, dtype, tuple(shape), keep=rules.check is not None)
        _take_summands(links, rules, closed, starts, about.why)
        present = closed.present
        require_quorum(rules, present, hospitals, about.why)
        if rules.check is None:
            break
        try:
            passed = rules.check.at_opener(domain, closed, functools.partial(say, links, present, "check"))
            present = tuple(name for name in present if name in passed)
            require_quorum(rules, present, hospitals, about.why)
            break
        except PeerLostError as error:
            left = tuple(name for name in present if name != error.peer and links.alive(name))
            log.warning("%s; the sum begins again without it", error)
            require_quorum(rules, left, hospitals, about.why)
            say(links, hospitals, "again", hospitals=list(left))
            hospitals = left
    else:
        raise SumLostError(f"'{about.why}' lost a party in every attempt", "see the logs of the hospitals")
    say(links, hospitals, "fixed", hospitals=list(present))
    fixed = FixedSum(closed, present, rules.smallest, 0)
    try:
        total = open_to(domain, Shared(about.what, fixed), [rules.opener], about.why, about.privacy, decode=False)
    except PeerLostError as error:
        raise SumLostError(f"'{about.why}' cannot be opened: {error.what}", "its summands are made anew") from None
    assert total is not None
    return present, total


def _take_summands(links: Links, rules: Rules, closed: ClosedSum, starts: Mapping[str, str], why: str) -> None:
    """Step 1 at the aggregator: those that are ready are told to send, at most two of them at a time."""
    plan, deadline = closed.plan, time.monotonic() + rules.seconds
    ready, summand = f"ready {plan.name}", f"summand {plan.name}"
    awaited, queue = dict.fromkeys(plan.hospitals, ready), list[str]()
    while awaited:
        sending = [name for name, tag in awaited.items() if tag == summand]
        while queue and len(sending) < _AT_A_TIME:
            name = queue.pop(0)
            awaited[name] = summand
            sending.append(name)
            say(links, [name], "send")
        name_or_none = links.await_any({name: tag for name, tag in awaited.items() if name not in queue}, deadline)
        name = name_or_none or next(iter(awaited))
        try:
            if links.key_fingerprint(name) != starts[name]:
                raise PeerLostError(name, f"{name} has started again")
            if awaited[name] == ready:
                links.receive_object(name, ready, deadline)
                queue.append(name)
            else:
                closed.take(name, links.receive_tensor(name, summand, closed.dtype, closed.shape, deadline))
                del awaited[name]
        except PeerLostError as error:
            if rules.closing == 0:
                raise
            log.warning("%s is left out of '%s': %s", name, why, error)
            del awaited[name]
            if name in queue:
                queue.remove(name)
