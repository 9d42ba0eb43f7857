"""The norm check among real parties: on summands masked as they are summed, one bit per hospital."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import ProofSize
from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import PeerLostError, ProtocolError
from mpc_fl.sharing.closed_sum import SummandMasks
from tests.support.checked_sums import (
    AGGREGATOR,
    BOUND,
    BUCKETS,
    PARAMETERS,
    Said,
    checked_sum,
    domain_of,
    hospitals_of,
    update,
)
from tests.support.harness import run_parties, run_parties_in_memory
from tests.support.signatories import signatories

ROUGH = 2.0**26
# Summands of one sum each: which bits must be opened.
SUMS: dict[str, tuple[float, list[str], list[bool]]] = {
    "honest": (BOUND, ["honest", "honest", "honest"], [True, True, True]),
    "boosted": (BOUND, ["honest", "long", "honest"], [True, False, True]),
    "wrapping sketch": (BOUND, ["half of the ring", "honest", "honest"], [False, True, True]),
    "wrapping squares": (BOUND, ["honest", "squares wrap", "honest"], [True, False, True]),
    "coarse": (ROUGH, ["honest", "long", "half of the ring"], [True, False, False]),
}
ONLY_64 = {"vanishing squares": (BOUND, ["squares vanish", "honest", "honest"], [False, True, True])}


def sums_of(ring_bits: int) -> dict[str, tuple[float, list[str], list[bool]]]:
    return SUMS | (ONLY_64 if ring_bits == 64 else {})


def check_sums(links: Any, directory: str, ring_bits: Literal[32, 64], count: int) -> Any:
    domain, results = domain_of(links, directory, count), dict[str, Any]()
    for number, (name, (bound, kinds, _)) in enumerate(sums_of(ring_bits).items()):
        test = NormTest(bound, ring_bits, BUCKETS)
        links.set_phase(name)
        x = None
        if links.name != AGGREGATOR:
            mine = hospitals_of(count).index(links.name)
            x = update([*kinds, *["honest"] * count][mine], bound, 10 * number + mine)
        results[name] = checked_sum(domain, name, test, x)
    results["bytes"] = {peer: each.bytes_sent for peer, each in links.traffic["honest"].items()}
    return results


@pytest.mark.processes
@pytest.mark.parametrize(("ring_bits", "count"), [(32, 3), (64, 5), (32, 2)])
def test_long_updates_are_caught_and_one_bit_per_hospital_is_opened(
    ring_bits: Literal[32, 64], count: int, tmp_path: Path
) -> None:
    """Refused honest updates are rarer than 1e-9 here, passed ones that are too long than 1e-6."""
    hospitals = hospitals_of(count)
    world = [*hospitals, AGGREGATOR]
    results = run_parties(check_sums, world, tmp_path, str(tmp_path), ring_bits, count, timeout=180)
    expected = sums_of(ring_bits)
    for name, (_, _, bits) in expected.items():
        said = dict(zip(hospitals_of(5), [*bits, True, True], strict=True))
        assert results[AGGREGATOR][name] == [who for who in hospitals if said[who]], name
    for party in world:
        record = [json.loads(line) for line in (tmp_path / f"{party}.jsonl").read_text().splitlines()]
        assert [(opening["shape"], opening["to"], opening["among"]) for opening in record] == [
            ([count], [AGGREGATOR], world)
        ] * len(expected)
        assert [opening["why"] for opening in record] == [f"norm check of 'sum {name}'" for name in expected]
        assert {opening["what"] for opening in record} == {"whether each update is within its norm bound"}
    # Bytes as the docstring of `norm_check` says, beside the summand; at most 300 for the frame of each message.
    size = ProofSize(NormTest(BOUND, ring_bits, BUCKETS), count)
    stated = 16 * (BUCKETS + size.bits + 66) + 16 * (count - 1) * (size.columns + 3)
    for name in hospitals:
        assert 0 <= results[name]["bytes"][AGGREGATOR] - stated - ring_bits // 8 * PARAMETERS < 5 * 300
        assert not any(sent for peer, sent in results[name]["bytes"].items() if peer != AGGREGATOR)


def _one_party_late(links: Any, directory: str, signatory: dict[str, Signatory]) -> Any:
    """A closed sum with a check to which hospital 1 sends nothing: its masks are in the other summands."""
    count = 3
    domain, test = domain_of(links, directory, count), NormTest(BOUND, 32, BUCKETS)
    domain.signatory = signatory[links.name]
    hospitals = tuple(hospitals_of(count))
    rules = Rules(AGGREGATOR, hospitals, 2, 1, 4.0, NormCheck(test, PARAMETERS))
    agreed = AgreedSum(hospitals, ("update", 1), Description("mean update", "round 1"))
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in hospitals}
        return collect(domain, rules, agreed, starts, torch.int32, (PARAMETERS,))[0]
    if links.name == "hospital-1":
        while links.receive_object(AGGREGATOR, "word")["word"] != "again":
            pass
        return "left out"
    x = update("honest", BOUND, int(links.name[-1])).int()
    return contribute(domain, rules, agreed, Private("update", x))


def test_a_sum_that_somebody_did_not_come_to_begins_again_before_its_norms_are_checked(tmp_path: Path) -> None:
    """Else the masks in common with it would hide the sketches from the check, and all would be refused."""
    names = [*hospitals_of(3), AGGREGATOR]
    results = run_parties_in_memory(_one_party_late, names, str(tmp_path), signatories(names, tmp_path / "identities"))
    assert results["hospital-1"] == "left out"
    assert {results[name] for name in ("hospital-0", "hospital-2", AGGREGATOR)} == {("hospital-0", "hospital-2")}


def _silent(links: Any, directory: str) -> Any:
    """Hospital 2 stops within the check; the others hear that the check ends, and wait for what comes next."""
    domain, test, said = domain_of(links, directory, 3), NormTest(BOUND, 32, BUCKETS), Said()
    if links.name == "hospital-2":
        links.send_tensor(AGGREGATOR, "summand", torch.zeros(PARAMETERS, dtype=torch.int32))
        links.receive_object(AGGREGATOR, "word")
        return None
    x = None if links.name == AGGREGATOR else update("honest", BOUND, 1)
    try:
        return checked_sum(domain, "a", test, x) or [line for line in said.lines if "stopped" in line]
    except PeerLostError as error:
        return error.peer


@pytest.mark.processes
def test_a_hospital_lost_within_the_check_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    results = run_parties(_silent, [*hospitals_of(3), AGGREGATOR], tmp_path, str(tmp_path), tolerated=hospitals_of(3))
    assert results[AGGREGATOR] == "hospital-2"
    stopped = ["the norm check of 'sum a' was stopped: a hospital was lost"]
    assert results["hospital-0"] == results["hospital-1"] == stopped


def test_a_check_of_others_than_those_of_the_sum_is_refused() -> None:
    """With fewer hospitals the masks of those that are missing would be, alone a hospital would give all to the opener."""
    from types import SimpleNamespace

    hospitals, seed = hospitals_of(3), "00" * 32
    masks: Any = SimpleNamespace(plan=SimpleNamespace(hospitals=tuple(hospitals), opener=AGGREGATOR), me="hospital-0")
    check, nowhere = NormCheck(NormTest(1000.0, 32, BUCKETS), PARAMETERS), SimpleNamespace()
    for word in (
        {},
        {"hospitals": hospitals},
        {"hospitals": hospitals, "sketch": "zz"},
        {"hospitals": hospitals, "sketch": "00"},
        {"hospitals": ["x"], "sketch": seed},
        {"hospitals": hospitals[:1], "sketch": seed},
        {"hospitals": hospitals[:2], "sketch": seed},
        {"hospitals": [*hospitals, "hospital-3"], "sketch": seed},
    ):
        with pytest.raises(ProtocolError, match=r"began a norm check|led a norm check"):
            check.at_hospital(nowhere, masks, word)  # type: ignore[arg-type]
    masks.plan.hospitals = ("hospital-0",)
    with pytest.raises(ProtocolError, match="began a norm check"):
        check.at_hospital(nowhere, masks, {"hospitals": ["hospital-0"], "sketch": seed})  # type: ignore[arg-type]


def test_a_summand_that_was_masked_in_place_cannot_be_checked() -> None:
    from mpc_fl.crypto.stream_cipher import Seed
    from mpc_fl.errors import SecrecyError
    from mpc_fl.sharing.sum_plan import SumPlan

    plan = SumPlan(("hospital-0", "hospital-1"), AGGREGATOR, ("sum",), 0, "seen alike")
    masks = SummandMasks(plan, "hospital-0", (4,), lambda _: Seed.from_system())
    masks.masked(Private("update", torch.zeros(4, dtype=torch.int32)), in_place=True)
    with pytest.raises(SecrecyError, match="was not kept"):
        _ = masks.encoded
