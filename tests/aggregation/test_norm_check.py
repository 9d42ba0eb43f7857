"""The norm check among real parties with a dealer: on summands masked as they are summed, one bit per hospital."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.errors import ProtocolError
from tests.support.harness import run_parties

HOSPITALS = [f"hospital-{rank}" for rank in range(3)]
WORLD = [*HOSPITALS, "aggregator"]


def hospitals_of(count: int) -> list[str]:
    return [f"hospital-{rank}" for rank in range(count)]


PARAMETERS, BUCKETS = 20_000, 1024
BLOCK = BUCKETS // 2
BOUND = 2.0**19  # no bit is dropped: squares are those of the buckets themselves
ROUGH = 2.0**26  # seven bits are


def update(kind: str, bound: float, number: int) -> torch.Tensor:
    """An encoded update, int64; a hospital's secret that this test knows."""
    normal = torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(number)).double()
    if kind in ("honest", "long"):
        return (normal / normal.norm() * bound * (1 if kind == "honest" else 10)).round().long()
    x = torch.zeros(PARAMETERS, dtype=torch.int64)
    if kind == "half of the ring":  # would vanish if signs were all the hash had
        x[: 2 * BLOCK] = -(2**31)
    elif kind in ("squares wrap", "squares vanish"):  # in Z_2^64 the squares of four buckets, of one, add up to 0
        x[:4] = 2**31
        x[0] = 2**32 if kind == "squares vanish" else 2**31
    return x


# Summands of one sum each: which bits must be opened.
SUMS: dict[str, tuple[float, list[str], list[bool]]] = {
    "honest": (BOUND, ["honest", "honest", "honest"], [True, True, True]),
    "boosted": (BOUND, ["honest", "long", "honest"], [True, False, True]),
    "wrapping sketch": (BOUND, ["half of the ring", "honest", "honest"], [False, True, True]),
    "wrapping squares": (BOUND, ["honest", "squares wrap", "honest"], [True, False, True]),
    "coarse": (ROUGH, ["honest", "long", "half of the ring"], [True, False, False]),
    # The last hospital sends too long an update, and then says in the check that its sketch was another one.
    "lie: zero": (BOUND, ["honest", "honest", "long"], [True, True, False]),
    "lie: a multiple of the ring": (BOUND, ["honest", "honest", "squares wrap"], [True, True, False]),
    "lie: half of it": (ROUGH, ["honest", "honest", "long"], [True, True, False]),
}
ONLY_64 = {"vanishing squares": (BOUND, ["squares vanish", "honest", "honest"], [False, True, True])}


def _told(name: str, truly: Any, test: Any, sketch: torch.Tensor) -> torch.Tensor:
    u = truly(test, sketch)
    if name == "lie: zero":
        return torch.zeros_like(u)
    if name == "lie: half of it":
        return u // 2
    return torch.where(u != 0, 2**32 + u, u)  # equal modulo 2^32, and its squares vanish where u is 2^31


def check_sums(links: Any, directory: str, ring_bits: int, count: int, prepared: bool) -> Any:
    from mpc_fl.aggregation.norm_check import NormCheck, prepare_norm_check
    from mpc_fl.aggregation.norm_limits import NormTest
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.crypto.secrecy import Private
    from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks, SumPlan
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer

    hospitals = hospitals_of(count)
    world = [*hospitals, "aggregator"]
    if links.name == "dealer":
        dealer = Dealer(links, world)
        dealer.serve()
        return dealer.ahead
    results: dict[str, Any] = {}
    with CrypTenRuntime(links, world, "dealer", 16) as runtime:
        domain = runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        dtype = torch.int32 if ring_bits == 32 else torch.int64
        for number, (name, (bound, kinds, _)) in enumerate(sums_of(ring_bits).items()):
            test = NormTest(bound, ring_bits, BUCKETS)  # type: ignore[arg-type]
            check = NormCheck(test, PARAMETERS)
            if prepared:
                prepare_norm_check(domain, test, len(hospitals))
            plan = SumPlan(tuple(hospitals), "aggregator", ("sum", name), 1)
            links.set_phase(name)
            if links.name == "aggregator":
                closed = ClosedSum(plan, dtype, (PARAMETERS,), keep=True)
                for hospital in hospitals:
                    closed.take(hospital, links.receive_tensor(hospital, "summand", dtype, (PARAMETERS,)))

                def say(**values: Any) -> None:
                    for hospital in hospitals:
                        links.send_object(hospital, "word", values)

                results[name] = check.at_opener(domain, closed, say)
            else:
                mine = hospitals.index(links.name)
                x = update([*kinds, *["honest"] * count][mine], bound, 10 * number + mine).to(dtype)
                masks = SummandMasks(plan, links.name, (PARAMETERS,), domain.sum_seed)
                links.send_tensor("aggregator", "summand", masks.masked(Private("update", x)))
                word = links.receive_object("aggregator", "word")
                if name.startswith("lie") and links.name == hospitals[2]:
                    told = partial(_told, name, NormTest.kept)
                    NormTest.kept = lambda test, sketch, told=told: told(test, sketch)  # type: ignore[assignment, misc]
                    check.at_hospital(domain, masks, word)
                    NormTest.kept = told.args[1]  # type: ignore[method-assign]
                else:
                    check.at_hospital(domain, masks, word)
        traffic = links.traffic["honest"]
        results["bytes"] = {peer: count.bytes_sent for peer, count in traffic.items()}
    return results


def sums_of(ring_bits: int) -> dict[str, tuple[float, list[str], list[bool]]]:
    return SUMS | (ONLY_64 if ring_bits == 64 else {})


@pytest.mark.processes
@pytest.mark.parametrize(("ring_bits", "count", "prepared"), [(32, 3, True), (64, 5, False)])
def test_long_updates_are_caught_and_one_bit_per_hospital_is_opened(
    ring_bits: int, count: int, prepared: bool, tmp_path: Path
) -> None:
    """Refused honest updates are rarer than 1e-9 here, passed ones that are too long than 2^-39 (lies) or 1e-6 (long)."""
    hospitals = hospitals_of(count)
    world = [*hospitals, "aggregator"]
    results = run_parties(
        check_sums, [*world, "dealer"], tmp_path, str(tmp_path), ring_bits, count, prepared, timeout=180
    )
    expected = sums_of(ring_bits)
    for name, (_, _, bits) in expected.items():
        assert results["aggregator"][name] == [who for who, bit in zip(hospitals, [*bits, True, True]) if bit], name  # noqa: B905
    records = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in world]
    for record in records:
        assert [(opening["shape"], opening["to"], opening["among"]) for opening in record] == [
            ([count], ["aggregator"], world)
        ] * len(expected)
        assert [opening["why"] for opening in record] == [f"norm check of 'sum {name}'" for name in expected]
        assert {opening["what"] for opening in record} == {"whether each update is within its norm bound"}
    assert (results["dealer"] > 0) == prepared
    # Bytes as the docstring of `norm_check` says; at most 300 for the frame of each message.
    stated = count * 8 * BUCKETS + 1288 * count * (24 + 2 * len(world))
    for name in hospitals:
        for other in hospitals:
            if other != name:
                assert 0 <= results[name]["bytes"][other] - stated - ring_bits // 8 * BUCKETS < 16 * 300, results[name]


def test_shares_of_another_form_and_parties_out_of_the_world_are_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from mpc_fl.aggregation.norm_check import NormCheck, norm_check
    from mpc_fl.aggregation.norm_limits import NormTest

    runtime = SimpleNamespace(links=SimpleNamespace(name="hospital-0"), world=WORLD, dealer_client=None)
    domain: Any = SimpleNamespace(runtime=runtime, links=runtime.links)
    test = NormTest(1000.0, 32, BUCKETS)
    good = torch.zeros(3, BUCKETS, dtype=torch.int32)
    for shares in (good[:2], good[:, 1:], good.long()):
        with pytest.raises(ProtocolError, match="another shape"):
            norm_check(domain, test, shares, HOSPITALS, "aggregator", "test")
    with pytest.raises(ProtocolError, match="outside of its world"):
        norm_check(domain, test, good, ["hospital-0", "hospital-1", "stranger"], "aggregator", "test")
    masks: Any = SimpleNamespace(plan=SimpleNamespace(hospitals=tuple(HOSPITALS), opener="aggregator"), me="hospital-0")
    for word in (
        {},
        {"hospitals": HOSPITALS},
        {"hospitals": ["x"], "sketch": "00" * 32},
        {"hospitals": HOSPITALS, "sketch": "zz"},
    ):
        with pytest.raises(ProtocolError, match="began a check"):
            NormCheck(test, PARAMETERS).at_hospital(domain, masks, word)


def test_without_a_dealer_nothing_is_checked() -> None:
    from types import SimpleNamespace

    from mpc_fl.aggregation.norm_check import norm_check
    from mpc_fl.aggregation.norm_limits import NormTest
    from mpc_fl.errors import SecrecyError

    runtime = SimpleNamespace(links=SimpleNamespace(name="hospital-0"), world=WORLD, dealer_client=None)
    domain: Any = SimpleNamespace(runtime=runtime)
    with pytest.raises(SecrecyError, match="needs a dealer"):
        norm_check(
            domain,
            NormTest(1000.0, 32, BUCKETS),
            torch.zeros(3, BUCKETS, dtype=torch.int32),
            HOSPITALS,
            "aggregator",
            "",
        )
