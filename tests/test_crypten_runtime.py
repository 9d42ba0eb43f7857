"""Stock CrypTen programs on our links, dealer and stream cipher give the plaintext results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_parties

pytestmark = pytest.mark.processes


def program(links: Any, directory: str, world_size: int) -> dict[str, Any] | int:
    """Arithmetic, convolution, comparison, division and a training step with CrypTen's own operators."""
    from mpc_fl.crypten_runtime import CrypTenRuntime, crypten
    from mpc_fl.dealer import Dealer
    from mpc_fl.opening import OpeningRecord, SecretDomain

    world = [f"party-{rank}" for rank in range(world_size)]
    if links.name == "dealer":
        dealer = Dealer(links, world)
        while dealer.serve_one():
            pass
        return dealer.served
    with CrypTenRuntime(links, world, "dealer", fraction_bits=16) as runtime:
        SecretDomain(runtime, OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(4, 6, generator=generator)
        y = torch.randn(4, 6, generator=generator)
        image = torch.randn(2, 3, 8, 8, generator=generator)
        weight = torch.randn(4, 3, 3, 3, generator=generator)
        last = world_size - 1
        shared_x, shared_y = crypten.cryptensor(x, src=0), crypten.cryptensor(y, src=last)
        shared_image, shared_weight = crypten.cryptensor(image, src=0), crypten.cryptensor(weight, src=last)
        shared = {
            "sum": shared_x + shared_y,
            "product": shared_x * shared_y,
            "matmul": shared_x.matmul(shared_y.t()),
            "square": shared_x.square(),
            "scaled": shared_x / 7,
            "convolution": shared_image.conv2d(shared_weight, stride=2, padding=1),
            "relu": shared_x.relu(),
            "less": shared_x < shared_y,
            "max": shared_x.max(dim=1, one_hot=False)[0],
            "reciprocal": (shared_x.square() + 1).reciprocal(),
        }
        model = crypten.nn.Sequential(crypten.nn.Linear(6, 5), crypten.nn.ReLU(), crypten.nn.Linear(5, 1))
        plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
        for (_, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            value = torch.randn(theirs.shape, generator=generator) / 3
            ours.data.copy_(value)
            theirs.data.copy_(value)
        model.encrypt(src=0)
        model.train()
        target = torch.ones(4, 1)
        loss = crypten.nn.MSELoss()(model(shared_x), crypten.cryptensor(target, src=0))
        loss.backward()
        model.update_parameters(0.1)
        opened = {name: tensor.get_plain_text() for name, tensor in shared.items()}
        model.decrypt()
        opened["trained"] = torch.cat([parameter.reshape(-1) for parameter in model.parameters()])
        expected_loss = torch.nn.functional.mse_loss(plain(x), target)
        expected_loss.backward()
        expected = {
            "sum": x + y,
            "product": x * y,
            "matmul": x @ y.t(),
            "square": x.square(),
            "scaled": x / 7,
            "convolution": torch.nn.functional.conv2d(image, weight, stride=2, padding=1),
            "relu": x.relu(),
            "less": (x < y).float(),
            "max": x.max(dim=1)[0],
            "reciprocal": 1 / (x.square() + 1),
            "trained": torch.cat([(p - 0.1 * p.grad).detach().reshape(-1) for p in plain.parameters()]),
        }
        return {name: float((opened[name].reshape(-1) - expected[name].reshape(-1)).abs().max()) for name in expected}


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_stock_programs_give_plaintext_results(world_size: int, tmp_path: Path) -> None:
    names = [f"party-{rank}" for rank in range(world_size)] + ["dealer"]
    results = run_parties(program, names, tmp_path, str(tmp_path), world_size)
    assert results["dealer"] > 20
    for rank in range(world_size):
        errors = results[f"party-{rank}"]
        assert len(errors) == 11
        worst = max(errors, key=errors.get)
        assert errors[worst] < 0.01, f"{worst}: {errors[worst]}"
    assert (tmp_path / "party-0.jsonl").read_text().count("\n") >= 10
