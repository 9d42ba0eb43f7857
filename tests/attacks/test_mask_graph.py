"""Attacks on sums masked in a circle: sets that would isolate a hospital, graphs of one's own, transcripts tried one by one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.aggregation.mask_graph import CORRECTNESS_BITS, MaskBounds, circle_order, mask_bounds, mask_circle
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import MpcFlError
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.sum_plan import SumPlan
from tests.support.circle_sums import (
    AGREED,
    HOSPITALS,
    NARROW,
    SIZE,
    WORLD,
    Fingerprints,
    circle_of,
    domain_of,
    one_circle_sum,
)
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories

FALSE_ALARM = 1e-7
OF_TWO = replace(NARROW, smallest=2)


def _ended(domain: Any, *arguments: Any) -> str:
    """An honest party's part in a sum that fails: what it says."""
    try:
        one_circle_sum(domain, *arguments)
    except MpcFlError as error:
        return str(error)
    return "opened"


def _nothing_recorded(directory: Path) -> bool:
    return not [path for path in directory.glob("*.jsonl") if path.read_text()]


def test_a_set_that_isolates_a_hospital_is_confirmed_by_nobody(tmp_path: Path) -> None:
    """The aggregator has all summands and leaves out who follows hospital X in the circle, all but one that colludes with it."""
    signatory, confirmed = signatories(WORLD, tmp_path / "identities"), list[str]()

    def isolating(links: Any) -> str:
        circle = circle_of(links, OF_TWO)
        alone = circle.order[0]
        left = [name for name in HOSPITALS if name == alone or name not in circle.neighbours(alone)[1:]]
        for name in HOSPITALS:
            links.receive_object(name, "ready update 1 0")
            links.send_object(name, "word", {"word": "send"})
            links.receive_tensor(name, "summand update 1 0", torch.int32, (SIZE,))
        for name in HOSPITALS:
            word = "fixed" if name in left else "end"
            links.send_object(name, "word", {"word": word, "hospitals": left, "late": []})
        return alone

    def party(links: Any) -> str:
        if links.name == AGGREGATOR:
            return isolating(links)
        return _ended(domain_of(links, tmp_path, signatory), OF_TWO)

    def note(sender: str, _receiver: str, frame: Any) -> None:
        if frame.tag.startswith(("confirm ", "keys ")):
            confirmed.append(sender)

    results = run_parties_in_memory(
        party, WORLD, tolerated=WORLD, prepare=lambda network: network.watch(note), linger_after_error=False
    )
    said = results[results[AGGREGATOR]]
    alone = results[AGGREGATOR]
    assert f"of the 3 hospitals that follow {alone} in the circle of masks 1 are left, and 2 are needed" in said
    assert "aggregator fixed" in said and confirmed == [] and _nothing_recorded(tmp_path)


def test_too_few_survivors_among_the_neighbours_stop_the_sum_and_name_whom(tmp_path: Path) -> None:
    signatory = signatories(WORLD, tmp_path / "identities")
    fixed = list[str]()

    def party(links: Any) -> str:
        circle = circle_of(links)
        if links.name in circle.following(circle.order[0], 2):
            return "lost"
        said = _ended(domain_of(links, tmp_path, signatory))
        if links.name == AGGREGATOR:
            for name in HOSPITALS:
                if name not in circle.following(circle.order[0], 2):
                    links.send_object(name, "word", {"word": "end"})  # as a run that ends
            return f"{circle.order[0]}: {said}"
        return said

    def note(sender: str, _receiver: str, frame: Any) -> None:
        if frame.tag.startswith(("confirm ", "keys ")):
            fixed.append(sender)

    results = run_parties_in_memory(party, WORLD, tolerated=HOSPITALS, prepare=lambda network: network.watch(note))
    first, said = results[AGGREGATOR].split(": ", 1)
    assert f"of the 3 hospitals that follow {first} in the circle of masks 1 are left, and 2 are needed" in said
    assert fixed == [] and _nothing_recorded(tmp_path)


@pytest.mark.parametrize("own", ["a model of its own", "another bound on colluders"])
def test_a_hospital_with_a_foreign_graph_is_refused(own: str, tmp_path: Path) -> None:
    signatory = signatories(WORLD, tmp_path / "identities")
    rules, agreed = NARROW, AGREED
    if own == "a model of its own":
        agreed = replace(AGREED, seen={"model": "another"})
    else:
        rules = replace(NARROW, colluders=2)

    def party(links: Any) -> str:
        domain = domain_of(links, tmp_path, signatory)
        if links.name == "hospital-4":
            assert circle_of(links, rules, agreed).order != circle_of(links).order
            return _ended(domain, rules, agreed)
        said = _ended(domain)
        for name in HOSPITALS if links.name == AGGREGATOR else ():
            links.send_object(name, "word", {"word": "end"})
        return said

    results = run_parties_in_memory(party, WORLD, tolerated=WORLD)
    assert "hospital-4" in results[AGGREGATOR] and "committed to different keys" in results[AGGREGATOR]
    assert "opened" not in results.values() and _nothing_recorded(tmp_path)


def test_every_hospital_and_all_that_was_told_has_a_part_in_the_graph() -> None:
    """Whoever leads cannot propose a graph: it follows from what each party holds itself, the keys of all among it."""
    fingerprints = {name: hashlib.sha256(name.encode()).hexdigest() for name in HOSPITALS}

    def order(of: dict[str, str], agreed: Any = AGREED, attempt: int = 0) -> tuple[str, ...]:
        links: Any = Fingerprints(of)
        return circle_order(HOSPITALS, transcript_of(links, NARROW, agreed, HOSPITALS, attempt))

    honest = order(fingerprints)
    assert honest == order(dict(fingerprints))
    changed = [order({**fingerprints, name: "0" * 64}) for name in HOSPITALS]
    changed.append(order(fingerprints, replace(AGREED, seen={"model": "another"})))
    changed.append(order(fingerprints, replace(AGREED, label=("update", 2))))
    changed.append(order(fingerprints, attempt=1))
    assert honest not in changed and len(set(changed)) == len(changed)


def test_trying_transcripts_pays_no_more_than_the_bound_says() -> None:
    """An aggregator that tries models until colluders stand together, against a graph far too small to be used.

    Of bounds in use 2^80 tries leave 2^-40: here a bound of a tenth is met by a tenth of the tries at most.
    """
    names, colluders, reach, most, tries = hospital_names(60), 6, 6, 3, 4000
    circle_of_few = MaskBounds(reach, most, 1)
    found = 0
    for number in range(tries):
        circle = mask_circle(names, hashlib.sha256(number.to_bytes(4, "big")).hexdigest(), circle_of_few)
        bad = [name in names[:colluders] for name in circle.order]
        found += any(sum((bad + bad)[place : place + reach]) > most for place in range(len(names)))
    bound = len(names) * float(stats.hypergeom(len(names), colluders, reach).sf(most))
    assert bound < 0.1
    assert stats.binomtest(found, tries, bound, alternative="greater").pvalue > FALSE_ALARM
    in_use = mask_bounds(1000, 200, 900)
    assert in_use is not None
    one = 1000 * float(stats.hypergeom(1000, 200, in_use.reach).sf(in_use.most_colluding))
    assert 2.0**80 * one <= 2.0**-40 and CORRECTNESS_BITS == 20


def test_masks_of_different_graphs_do_not_cancel() -> None:
    """Two groups of hospitals that were told different models: whatever is added up of what they send is uniform."""
    seeds = {
        frozenset((a, b)): bytes([i, j]) * 16 for i, a in enumerate(HOSPITALS) for j, b in enumerate(HOSPITALS) if i < j
    }
    sent = {}
    for place, name in enumerate(HOSPITALS):
        transcript = "aa" * 32 if place < 4 else "bb" * 32
        bounds = NARROW.bounds(len(HOSPITALS))
        assert bounds is not None
        circle = mask_circle(HOSPITALS, transcript, bounds)
        plan = SumPlan(HOSPITALS, AGGREGATOR, ("update", 1), 0, transcript, circle)
        masks = SummandMasks(plan, name, (20_000,), lambda other, name=name: Seed(seeds[frozenset((name, other))]))  # type: ignore[misc]
        sent[name] = masks.masked(Private("update", torch.zeros(20_000, dtype=torch.int32)))
    for chosen in (HOSPITALS, HOSPITALS[:4], HOSPITALS[4:], HOSPITALS[:1], HOSPITALS[3:5]):
        total = torch.stack([sent[name] for name in chosen]).sum(0, dtype=torch.int32)
        digits = np.bincount((total.numpy().view(np.uint32) >> 24).astype(np.int64), minlength=256)
        assert float(stats.chisquare(digits).pvalue) > FALSE_ALARM, chosen
