"""Sums of more than sixteen hospitals over links in memory: masks and confirmations of neighbours alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.aggregation.mask_costs import mask_costs
from mpc_fl.aggregation.quorum_sum import plan_of
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.errors import SumLostError
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.roles import AGGREGATOR, hospital_names
from tests.support.circle_sums import (
    HOSPITALS,
    SIZE,
    WORLD,
    Fingerprints,
    circle_of,
    domain_of,
    one_circle_sum,
    total_of,
)
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories

MANY = tuple(hospital_names(18))


@pytest.mark.parametrize(("quorum", "closing"), [(17, 2), (18, 0)])
def test_eighteen_hospitals_share_masks_with_their_neighbours(quorum: int, closing: int, tmp_path: Path) -> None:
    rules = Rules(AGGREGATOR, MANY, quorum, closing, 60.0, colluders=3)
    agreed = AgreedSum(MANY, ("update", 1), Description("mean update", "round 1"))
    bounds = rules.bounds(18)
    assert bounds is not None and bounds.neighbours < 17
    world = [*MANY, AGGREGATOR]
    signatory, keys, signatures = signatories(world, tmp_path / "identities"), dict[str, int](), dict[str, int]()
    traffic = list[tuple[int, int]]()

    def note(sender: str, receiver: str, frame: Any) -> None:
        said = frame.payload if isinstance(frame.payload, dict) else {}
        if "keys" in said:
            keys[sender] = len(said["keys"])
        if said.get("word") == "confirmed":
            signatures[receiver] = len(said["signatures"])

    def party(links: Any) -> Any:
        links.set_phase("sum")
        found = one_circle_sum(domain_of(links, tmp_path, signatory, world), rules, agreed)
        if links.name != AGGREGATOR:
            told = links.traffic["sum"][AGGREGATOR]
            traffic.append((told.bytes_sent - 4 * SIZE, told.bytes_received))
        return found

    results = run_parties_in_memory(party, world, prepare=lambda network: network.watch(note))
    costs = mask_costs(rules, 18)
    sent, received = max(traffic)[0], max(received for _, received in traffic)
    assert 0.8 * costs.bytes_sent <= sent <= 1.05 * costs.bytes_sent
    estimated = costs.bytes_received + costs.bytes_of_names
    assert 0.8 * estimated <= received <= 1.05 * estimated
    assert results[AGGREGATOR] == (MANY, total_of(MANY))
    assert signatures == dict.fromkeys(MANY, bounds.neighbours + 1)
    assert keys == (dict.fromkeys(MANY, bounds.neighbours + 2 * bounds.closing) if closing else {})
    records = {(tmp_path / f"{name}.jsonl").read_text() for name in MANY}
    among = {tuple(json.loads(line)["among"]) for record in records for line in record.splitlines()}
    assert among == {tuple(world)}


@pytest.mark.parametrize("place", [0, 4])
def test_the_sum_goes_on_without_a_hospital_that_is_lost(place: int, tmp_path: Path) -> None:
    signatory = signatories(WORLD, tmp_path / "identities")

    def party(links: Any) -> Any:
        if links.name == circle_of(links).order[place]:
            return "lost"
        return one_circle_sum(domain_of(links, tmp_path, signatory))

    results = run_parties_in_memory(party, WORLD, tolerated=HOSPITALS)
    lost = next(name for name in HOSPITALS if results[name] == "lost")
    rest = tuple(name for name in HOSPITALS if name != lost)
    assert results[AGGREGATOR] == (rest, total_of(rest))
    assert all(results[name] == (rest, None) for name in rest)


@pytest.mark.parametrize(
    ("at", "missing", "opens"),
    [
        ("confirm", None, False),  # a V that was signed is not signed anew
        ("keys", None, True),  # others hold all keys that are needed
        ("keys", 4, True),  # the missing one is nobody's neighbour that is lost: its masks end before it
        ("keys", 1, False),  # the key of the mask between the two is lost with both
    ],
)
def test_a_hospital_that_is_lost_after_its_summand(at: str, missing: int | None, opens: bool, tmp_path: Path) -> None:
    signatory, order = signatories(WORLD, tmp_path / "identities"), list[str]()

    def party(links: Any) -> Any:
        order[:] = circle_of(links).order
        if missing is not None and links.name == order[missing]:
            return "missing"
        try:
            return one_circle_sum(domain_of(links, tmp_path, signatory))
        except SumLostError as error:
            return error.lost

    def lose_the_first(network: InMemoryNetwork) -> None:
        def watch(sender: str, _receiver: str, frame: Any) -> None:
            if frame.tag.startswith(f"{at} ") and sender == order[0]:
                network.drop(sender)

        network.watch(watch)

    results = run_parties_in_memory(party, WORLD, tolerated=HOSPITALS, prepare=lose_the_first)
    admitted = tuple(name for name in HOSPITALS if results.get(name) != "missing")
    assert order[0] not in results and len(admitted) == (9 if missing is None else 8)
    expected = (admitted, total_of(admitted)) if opens else order[0]
    assert results.pop(AGGREGATOR) == expected
    assert {name: found for name, found in results.items() if found != "missing"} == {
        name: (admitted, None) if opens else order[0] for name in admitted if name != order[0]
    }


def test_up_to_sixteen_hospitals_nothing_is_other_than_without_a_graph() -> None:
    """Transcript, and so every mask and byte, and the plan: whatever is said of colluders."""
    few = MANY[:16]
    rules = Rules(AGGREGATOR, few, 14, 2, 60.0)
    agreed = AgreedSum(few, ("update", 1), Description("mean update", "round 1"))
    links: Any = Fingerprints(dict.fromkeys(few, "f" * 64))
    with_graph = replace(rules, colluders=3)
    assert transcript_of(links, rules, agreed, few, 0) == transcript_of(links, with_graph, agreed, few, 0)
    plan = plan_of(links, with_graph, agreed, few, 0)
    assert plan == plan_of(links, rules, agreed, few, 0) and plan.circle is None


def test_a_sum_whose_norms_are_checked_has_masks_between_all() -> None:
    rules = Rules(AGGREGATOR, MANY, 17, 2, 60.0, colluders=3)
    agreed = AgreedSum(MANY, ("update", 1), Description("mean update", "round 1"))
    links: Any = Fingerprints(dict.fromkeys(MANY, "f" * 64))
    check: Any = object()  # whichever it is
    assert plan_of(links, rules, agreed, MANY, 0).circle is not None
    assert plan_of(links, replace(rules, check=check), agreed, MANY, 0).circle is None
