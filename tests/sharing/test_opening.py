"""Openings and zero-shares between real processes that never import CrypTen: exact, masked as agreed, recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.errors import SecrecyError
from mpc_fl.sharing.opening import SecretDomain, open_to
from tests.support.harness import run_parties, run_parties_in_memory

WORLD = ["party-0", "party-1", "party-2"]
WITHOUT_CRYPTEN = (
    "mpc_fl.sharing.opening",
    "mpc_fl.sharing.secure_sum",
    "mpc_fl.sharing.dealer",
    "mpc_fl.aggregation.quorum_sum",
    "mpc_fl.inference.fast.diagnosis",
    "mpc_fl.aggregation.norm_plan",
)


def test_what_opens_and_sums_values_imports_neither_crypten_nor_opacus() -> None:
    program = "import sys, importlib\nfor module in sys.argv[1:]:\n    importlib.import_module(module)\n"
    program += "    print(*(f'{module}: {name}' for name in ('crypten', 'opacus') if name in sys.modules))"
    command = [sys.executable, "-c", program, *WITHOUT_CRYPTEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [], done.stdout


def _share(rank: int, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.iinfo(dtype).max
    return torch.tensor([rank, -5 * rank, largest - rank, 1 << rank], dtype=dtype)


def openings(links: Any, directory: str) -> Any:
    """Four openings of shares that the parties hold from somewhere, and what the opener received for each."""
    from mpc_fl.audit.opening_record import OpeningRecord

    domain = SecretDomain(links, WORLD, OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
    rank = WORLD.index(links.name)
    opened = []
    links.set_phase("openings")
    for dtype in (torch.int32, torch.int64):
        for exclusive_or in (False, True):
            share = RingShare(_share(rank, dtype), 1, exclusive_or)
            value = open_to(domain, Shared("a value", share), ["party-2"], "test", decode=exclusive_or is False)
            assert torch.equal(share.elements, _share(rank, dtype))
            opened.append(None if value is None else value.tolist())
    traffic = links.traffic.get("openings", {})
    sent = {peer: (count.messages_sent, count.bytes_sent) for peer, count in traffic.items() if count.messages_sent}
    with pytest.raises(SecrecyError, match="zero-shares"):
        SecretDomain(links, WORLD, domain.record)  # its masks would repeat those of the first
    mask = domain.zero_shares.zero_share((3, 2))
    again = torch.ones(3, 2, dtype=torch.int64)
    domain.zero_shares.add_zero_share(again)
    return {"opened": opened, "mask": mask.tolist(), "again": again.tolist(), "sent": sent}


@pytest.mark.processes
def test_shares_by_sum_and_by_exclusive_or_are_opened_in_both_rings_to_one_party(tmp_path: Path) -> None:
    results = run_parties(openings, WORLD, tmp_path, str(tmp_path))
    expected = []
    for dtype in (torch.int32, torch.int64):
        shares = [_share(rank, dtype) for rank in range(3)]
        expected.append(((shares[0] + shares[1] + shares[2]).double() / 2).tolist())
        expected.append((shares[0] ^ shares[1] ^ shares[2]).tolist())
    assert results["party-2"]["opened"] == expected
    assert all(results[name]["opened"] == [None] * 4 for name in WORLD[:2])
    masks = [torch.tensor(results[name]["mask"]) for name in WORLD]
    assert not torch.stack(masks).sum(0).any() and all(
        mask.all() for mask in masks
    )  # uniform: a zero among 18 has probability 2^-59
    refreshed = [torch.tensor(results[name]["again"]) for name in WORLD]
    assert torch.equal(torch.stack(refreshed).sum(0), torch.full((3, 2), 3))
    assert all(not torch.equal(fresh - 1, mask) for fresh, mask in zip(refreshed, masks, strict=True))
    # One message for each opening, to the opener alone: four elements of 4, 4, 8 and 8 bytes, and what frames a message.
    for name in WORLD[:2]:
        assert list(results[name]["sent"]) == ["party-2"]
        messages, size = results[name]["sent"]["party-2"]
        assert messages == 4 and 4 * 24 <= size < 4 * 24 + 4 * 300
    for name in WORLD:
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(record["shape"], record["to"], record["among"]) for record in records] == [
            ([4], ["party-2"], WORLD)
        ] * 4


def expanded_twice(links: Any) -> Any:
    """A zero-share by the project's class, and the same one by its definition."""
    from mpc_fl.sharing.zero_shares import ZeroShares

    seeds = {}

    class Watched:
        name = links.name

        @staticmethod
        def pairwise_seed(peer: str, purpose: str) -> Any:
            seed = links.pairwise_seed(peer, purpose)
            seeds[peer, purpose] = seed.again()
            return seed

    zero_shares = ZeroShares(Watched(), WORLD)  # type: ignore[arg-type]
    zero_shares.zero_share((5,))
    share = zero_shares.zero_share((5,))
    stated = torch.zeros(5, dtype=torch.int64)
    for (peer, purpose), seed in seeds.items():
        assert purpose == "zero-shares"
        stream = seed.stream("zero-share", 2)
        (stream.add_to if links.name < peer else stream.subtract_from)(stated)
    return torch.equal(share, stated)


def test_zero_shares_are_made_of_the_stated_purpose_and_labels() -> None:
    assert run_parties_in_memory(expanded_twice, WORLD) == dict.fromkeys(WORLD, True)
