"""Secure sums between real processes: exact, hidden, opened only where asked, recorded.

Statistical tests: fixed thresholds, fresh randomness, false-alarm rate 1e-7 each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.crypto.ring import FixedPoint
from mpc_fl.learning.models.evaluation import evaluation_length
from tests.support.harness import run_parties

pytestmark = pytest.mark.processes
FALSE_ALARM = 1e-7
SIZE = 20_000


def _values(rank: int) -> torch.Tensor:
    return torch.linspace(-3, 3, 257, dtype=torch.float64) * (rank + 1)


def sums(links: Any, directory: str, world: list[str]) -> dict[str, Any]:
    """A weighted mean, an evaluation and an opening that fails for the others."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.crypto.ring import Headroom
    from mpc_fl.crypto.secrecy import Private
    from mpc_fl.errors import SecrecyError
    from mpc_fl.learning.models.evaluation import evaluate_locally
    from mpc_fl.sharing.crypten_parts import mpc_tensor_from_share
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.secure_sum import encode_weighted, secure_sum, weighted_mean
    from tests.support.summed_evaluation import summed_evaluation

    rank, opener = world.index(links.name), world[-1]
    with CrypTenRuntime(links, world, None, fraction_bits=24) as runtime:
        domain = runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        headroom = Headroom(FixedPoint(24, 64.0), len(world), 1000)
        encoded = encode_weighted(Private("update", _values(rank)), Private("count", 10 + rank), headroom)
        mean = weighted_mean(domain, encoded, opener, "test")
        labels = torch.tensor([0, 1, 2, 2])
        probabilities = torch.eye(3)[torch.tensor([0, 1, 2, rank % 3])]
        evaluation = summed_evaluation(domain, evaluate_locally(probabilities, labels), 3, opener, "evaluation")
        shared = secure_sum(domain, Private("secret", torch.tensor([rank])), 0)
        with pytest.raises(SecrecyError):
            print(shared)
        tensor = mpc_tensor_from_share(shared.inside_protocol().elements, 0)
        with pytest.raises(SecrecyError):
            tensor * tensor  # no dealer: nothing may fall back to a first party
        # The shares of two very different secrets, as the opener would receive them.
        views = []
        for secret in (torch.zeros(SIZE, dtype=torch.int64), torch.full((SIZE,), 123456789)):
            share = secure_sum(domain, Private("secret", secret), 0)
            views.append(share.inside_protocol().elements.numpy().copy())
    return {
        "mean": None if mean is None else mean.tolist(),
        "confusion": None if evaluation is None else evaluation.confusion.tolist(),
        "views": views,
    }


@pytest.mark.parametrize("parties", [2, 3, 5])
def test_sums_are_exact_and_shares_are_uniform(parties: int, tmp_path: Path) -> None:
    world = [f"party-{rank}" for rank in range(parties)]
    results = run_parties(sums, world, tmp_path, str(tmp_path), world)

    weights = [10 + rank for rank in range(parties)]
    unit = FixedPoint(24, 64.0)
    exact = sum(unit.encode(_values(r), "x") * w for r, w in enumerate(weights)).double() / 2**24 / sum(weights)
    opened = torch.tensor(results[world[-1]]["mean"], dtype=torch.float64)
    assert torch.equal(opened, exact)
    assert all(results[name]["mean"] is None and results[name]["confusion"] is None for name in world[:-1])
    confusion = torch.tensor(results[world[-1]]["confusion"])
    assert int(confusion.sum()) == 4 * parties and int(confusion[0, 0]) == parties

    for name in world:
        zeros, constants = results[name]["views"]
        for view in (zeros, constants):
            for shift in (0, 28, 56):
                digit = (view.view(np.uint64) >> np.uint64(shift)) & np.uint64(255)
                counts = np.bincount(digit.astype(np.int64), minlength=256)
                assert stats.chisquare(counts).pvalue > FALSE_ALARM
        assert stats.ks_2samp(zeros, constants).pvalue > FALSE_ALARM
        assert abs(np.corrcoef(zeros, constants)[0, 1]) < 5.4 / np.sqrt(SIZE)
    total = sum(results[name]["views"][1].view(np.uint64) for name in world)
    assert (total.view(np.int64) == 123456789 * parties).all()

    for name in world:
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [record["to"] for record in records] == [[world[-1]]] * 3
        assert [record["shape"] for record in records] == [[257], [1], [evaluation_length(3)]]
        assert all(record["among"] == world for record in records)


def coalition(links: Any, world: list[str]) -> np.ndarray:
    """The share of zero that this party adds."""
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime

    with CrypTenRuntime(links, world, None, fraction_bits=16) as runtime:
        return runtime.zero_share((SIZE,)).numpy()


def test_two_neighbours_do_not_unmask_the_party_between_them(tmp_path: Path) -> None:
    """In CrypTen's ring of neighbours party 1's mask is known to parties 0 and 2 together. Here party 3's seed is missing."""
    world = [f"party-{rank}" for rank in range(4)]
    results = run_parties(coalition, world, tmp_path, world)
    total = sum(results[name].view(np.uint64) for name in world)
    assert not total.any()
    neighbours = (results["party-0"].view(np.uint64) + results["party-2"].view(np.uint64)).view(np.int64)
    for sign in (1, -1):
        residue = (
            results["party-1"].view(np.uint64) + np.uint64(sign % 2**64) * neighbours.view(np.uint64)
        ) >> np.uint64(56)
        assert stats.chisquare(np.bincount(residue.astype(np.int64), minlength=256)).pvalue > FALSE_ALARM
