"""Stock CrypTen programs give the same results on our links, dealer and stream cipher as on CrypTen's own runtime.

Every program is a function of CrypTen alone. The same parties run it twice: on stock CrypTen (gloo, trusted first
party, `torch.Generator`), then on `CrypTenRuntime`, where a draw from torch's generators raises. Both results are
compared with plaintext and with each other.

A fixed-point truncation fails with probability |value| * 2^-32 per element, in CrypTen's design and so in both runs
(value before scaling, below 16). With fewer than 100,000 truncated elements a false alarm is rarer than 1 in 2,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from mpc_fl.apps.bench.stock_crypten import stock_crypten
from tests.support.harness import free_ports, local_links, run_parties
from tests.support.no_torch_randomness import NoTorchRandomness

pytestmark = pytest.mark.processes

PARTIES = [f"party-{rank}" for rank in range(5)]
FRACTION_BITS = 16
Tensors = dict[str, torch.Tensor]
Program = Callable[[SimpleNamespace], Any]


def _inputs() -> Tensors:
    """The parties' secrets; for the test's sake every party can compute them."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(4, 6),
        "y": normal(4, 6),
        "small": normal(4, 6).clamp(-1.5, 1.5) / 2,
        "positive": normal(4, 6).square().clamp(max=4) + 0.5,
        "series": normal(2, 3, 9),
        "image": normal(2, 3, 6, 6),
        "kernel_1d": normal(4, 3, 3) / 2,
        "kernel_2d": normal(4, 3, 3, 3) / 2,
        "transposed_1d": normal(3, 2, 3) / 2,
        "transposed_2d": normal(3, 2, 3, 3) / 2,
    }


INPUTS = _inputs()
# Secrets for binary sharing: every bit counts.
WORDS = {"m": torch.tensor([0b1100, 7, -1, 2**40]), "n": torch.tensor([0b1010, 56, 12345, 2**40 + 1])}


def both(program: Program) -> tuple[Program, Program]:
    """CrypTen and torch spell it alike."""
    return program, program


# name: (on CrypTen tensors, on torch tensors)
PROGRAMS: dict[str, tuple[Program, Program]] = {
    "add": both(lambda v: v.x + v.y),
    "add public": both(lambda v: v.x + 1.5),
    "multiply": both(lambda v: v.x * v.y),
    "multiply by public": both(lambda v: v.x * 0.37),
    "matmul": both(lambda v: v.x.matmul(v.y.t())),
    "square": both(lambda v: v.x.square()),
    "cube": both(lambda v: v.small.pow(3)),
    "divide by public": both(lambda v: v.x / 7),
    "divide": both(lambda v: v.x / v.positive),
    "sum": both(lambda v: v.x.sum(1)),
    "mean": both(lambda v: v.x.mean(0)),
    "variance": both(lambda v: v.x.var(1)),
    "cumulative sum": both(lambda v: v.x.cumsum(1)),
    "concatenate": (lambda v: v.crypten.cat([v.x, v.y], dim=1), lambda v: torch.cat([v.x, v.y], dim=1)),
    "stack": (lambda v: v.crypten.stack([v.x, v.y], dim=1), lambda v: torch.stack([v.x, v.y], dim=1)),
    "rearrange": both(lambda v: v.image.transpose(1, 2)[:, 1:4].flatten(1)),
    "convolution 1d": (
        lambda v: v.series.conv1d(v.kernel_1d, padding=1),
        lambda v: functional.conv1d(v.series, v.kernel_1d, padding=1),
    ),
    "convolution 2d": (
        lambda v: v.image.conv2d(v.kernel_2d, stride=2, padding=1),
        lambda v: functional.conv2d(v.image, v.kernel_2d, stride=2, padding=1),
    ),
    "transposed convolution 1d": (
        lambda v: v.series.conv_transpose1d(v.transposed_1d, stride=2),
        lambda v: functional.conv_transpose1d(v.series, v.transposed_1d, stride=2),
    ),
    "transposed convolution 2d": (
        lambda v: v.image.conv_transpose2d(v.transposed_2d, stride=2, padding=1),
        lambda v: functional.conv_transpose2d(v.image, v.transposed_2d, stride=2, padding=1),
    ),
    "average pool": (lambda v: v.image.avg_pool2d(2), lambda v: functional.avg_pool2d(v.image, 2)),
    "max pool": (lambda v: v.image.max_pool2d(2), lambda v: functional.max_pool2d(v.image, 2)),
    "less": (lambda v: v.x < v.y, lambda v: (v.x < v.y).float()),
    "equal": (lambda v: v.x == v.x_again, lambda v: torch.ones_like(v.x)),
    "relu": both(lambda v: v.x.relu()),
    "sign": both(lambda v: v.x.sign()),
    "max": (lambda v: v.x.max(dim=0, one_hot=False)[0], lambda v: v.x.max(dim=0)[0]),
    "argmax": (lambda v: v.x.argmax(dim=0), lambda v: functional.one_hot(v.x.argmax(dim=0), 4).t().float()),
    "to bits and back": (
        lambda v: v.x.to(v.crypten.mpc.binary).to(v.crypten.mpc.arithmetic),
        lambda v: v.x,
    ),
    "where": (lambda v: v.crypten.where(v.x < v.y, v.x, v.y), lambda v: torch.minimum(v.x, v.y)),
    "exponential": both(lambda v: v.small.exp()),
    "logarithm": both(lambda v: v.positive.log()),
    "reciprocal": both(lambda v: v.positive.reciprocal()),
    "square root": both(lambda v: v.positive.sqrt()),
    "sigmoid": both(lambda v: v.x.sigmoid()),
    "softmax": both(lambda v: v.x.softmax(0)),
}
BINARY_PROGRAMS: dict[str, tuple[Program, Program]] = {
    "exclusive or": both(lambda v: v.m ^ v.n),
    "and": both(lambda v: v.m & v.n),
    "or": both(lambda v: v.m | v.n),
    "not": both(lambda v: ~v.m),
    "exclusive or with public": both(lambda v: v.m ^ 5),
    "add bits": both(lambda v: v.m + v.n),
}


def perceptron(nn: Any) -> Any:
    """A classifier of 6 features, in `crypten.nn` or `torch.nn`."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def convolutional(nn: Any) -> Any:
    """A classifier of 6 x 6 images with BatchNorm, in `crypten.nn` or `torch.nn`."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


TARGET = functional.one_hot(torch.tensor([0, 2, 1, 2]), 3).float()
LEARNING_RATE = 0.5
# name: (network, its input, loss as crypten.nn and torch.nn call it, target)
STEPS: dict[str, tuple[Callable[[Any], Any], str, str, torch.Tensor]] = {
    "mean-square step": (perceptron, "x", "MSELoss", TARGET),
    "cross-entropy step": (perceptron, "x", "CrossEntropyLoss", TARGET),
    "BatchNorm step": (convolutional, "image", "MSELoss", TARGET[:2]),
}


def networks(nn: Any) -> dict[str, Any]:
    """One network per training step and one to evaluate, with weights that depend on the order of parameters only."""
    built = {name: build(nn).train() for name, (build, *_) in STEPS.items()} | {"network": convolutional(nn).eval()}
    for network in built.values():
        generator = torch.Generator().manual_seed(5)
        for parameter in network.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return built


def plaintext() -> Tensors:
    """What every program must give."""
    results = {name: program(SimpleNamespace(**INPUTS)) for name, (_, program) in PROGRAMS.items()}
    results |= {name: program(SimpleNamespace(**WORDS)) for name, (_, program) in BINARY_PROGRAMS.items()}
    models = networks(torch.nn)
    for name, (_, value, loss_name, target) in STEPS.items():
        getattr(torch.nn, loss_name)()(models[name](INPUTS[value]), target).backward()
        after = [parameter - LEARNING_RATE * parameter.grad for parameter in models[name].parameters()]
        results[name] = torch.cat([parameter.detach().reshape(-1) for parameter in after])
    results["network"] = models["network"](INPUTS["image"]).detach()
    results["batched sum"] = torch.cat([INPUTS["x"].reshape(-1), INPUTS["positive"].reshape(-1)])
    return results


def run_programs(crypten: Any, world_size: int, models: dict[str, Any]) -> Tensors:
    """All programs on CrypTen as it is set up now; the first and the last party own the inputs in turn."""
    owners = [0, world_size - 1]
    secrets = {name: crypten.cryptensor(v, src=owners[i % 2]) for i, (name, v) in enumerate(INPUTS.items())}
    again = crypten.cryptensor(INPUTS["x"], src=world_size - 1)
    values = SimpleNamespace(crypten=crypten, x_again=again, **secrets)
    results = {name: program(values).get_plain_text() for name, (program, _) in PROGRAMS.items()}

    primitives, binary = crypten.mpc.primitives, crypten.mpc.binary
    shared_words = {name: primitives.BinarySharedTensor(v, src=owners[i]) for i, (name, v) in enumerate(WORDS.items())}
    for name, (program, _) in BINARY_PROGRAMS.items():
        share = program(SimpleNamespace(**shared_words)).share
        results[name] = crypten.mpc.MPCTensor.from_shares(share, precision=0, ptype=binary).get_plain_text()

    for name, (_, value, loss_name, target) in STEPS.items():
        network = models[name].encrypt(src=0)
        loss = getattr(crypten.nn, loss_name)()
        loss(network(secrets[value]), crypten.cryptensor(target, src=world_size - 1)).backward()
        network.update_parameters(LEARNING_RATE)
        network.decrypt()
        results[name] = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
    results["network"] = models["network"].encrypt(src=world_size - 1)(secrets["image"]).get_plain_text()

    shares = [secrets["x"].share, secrets["positive"].share]
    totals = crypten.communicator.get().all_reduce(shares, batched=True)
    results["batched sum"] = torch.cat([total.reshape(-1) for total in totals]).double().div(2**FRACTION_BITS).float()
    return results


def on_both_runtimes(own: Any, directory: str, ports: dict[int, dict[str, int]]) -> dict[int, Any]:
    """One party: all programs in every world it belongs to, first on stock CrypTen, then on ours."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer

    results: dict[int, Any] = {}
    for world_size in ports:
        world = PARTIES[:world_size]
        names = [*world, "dealer"]
        if own.name not in names:
            continue
        if own.name == "dealer":
            with local_links(own.name, names, ports[world_size], Path(directory)) as links:
                dealer = Dealer(links, world)
                dealer.serve()
                results[world_size] = dealer.served
            continue
        with stock_crypten(world.index(own.name), world_size, Path(directory) / f"gloo-{world_size}"):
            stock = run_programs(crypten, world_size, networks(crypten.nn))
        models = networks(crypten.nn)
        with local_links(own.name, names, ports[world_size], Path(directory)) as links:
            with CrypTenRuntime(links, world, "dealer", FRACTION_BITS) as runtime:
                record = OpeningRecord(Path(directory) / f"openings-{world_size}-{own.name}.jsonl", own.name)
                runtime.domain(record)
                with NoTorchRandomness():
                    ours = run_programs(crypten, world_size, models)
        results[world_size] = tuple({name: value.numpy() for name, value in run.items()} for run in (stock, ours))
    return results


# Five parties of stock CrypTen on two cores wait for each other most of a minute.
@pytest.fixture(scope="module", params=[2, 3, pytest.param(5, marks=pytest.mark.slow)])
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, dict[str, Any]]:
    """The size of a world, and the results of its parties and a dealer."""
    directory, world_size = tmp_path_factory.mktemp("runtimes"), request.param
    names = [*PARTIES[:world_size], "dealer"]
    ports = {world_size: dict(zip(names, free_ports(len(names)), strict=True))}
    results = run_parties(on_both_runtimes, names, directory, str(directory), ports, timeout=240)
    return world_size, directory, results


# Largest error where CrypTen approximates (Knott et al. 2021, section 5.1, and truncation once per squaring).
TOLERANCES = {"exponential": 0.15, "logarithm": 0.1, "square root": 0.02, "sigmoid": 0.02, "softmax": 0.03}
TOLERANCES |= {"divide": 0.01, "reciprocal": 0.01, "cross-entropy step": 0.01, "BatchNorm step": 0.01}
FIXED_POINT = 0.002  # everywhere else; integers and comparisons are exact
EXACT = {"less", "equal", "sign", "argmax", *BINARY_PROGRAMS}


def test_same_results_as_stock_crypten_and_plaintext(outcomes: tuple[int, Path, dict[str, Any]]) -> None:
    world_size, _, results = outcomes
    expected = {name: value.numpy() for name, value in plaintext().items()}
    first = results["party-0"][world_size][1]
    for party in PARTIES[:world_size]:
        stock, ours = results[party][world_size]
        assert stock.keys() == ours.keys() == expected.keys()
        for name, value in expected.items():
            where = f"{name} at {party} of {world_size}"
            assert ours[name].shape == stock[name].shape == value.shape, where
            assert ours[name].dtype == stock[name].dtype, where
            assert (ours[name] == first[name]).all(), f"{where}: the parties opened different values"
            tolerance = 0 if name in EXACT else TOLERANCES.get(name, FIXED_POINT)
            for one, other in ((stock[name], value), (ours[name], value), (ours[name], stock[name])):
                assert abs(one - other).max() <= tolerance, f"{where}: {abs(one - other).max()}"


def test_the_dealer_served_and_every_opening_is_recorded(outcomes: tuple[int, Path, dict[str, Any]]) -> None:
    world_size, directory, results = outcomes
    assert results["dealer"][world_size] > len(PROGRAMS)
    openings = [
        [json.loads(line) for line in (directory / f"openings-{world_size}-{party}.jsonl").read_text().splitlines()]
        for party in PARTIES[:world_size]
    ]
    assert all(len(record) >= len(PROGRAMS) + len(BINARY_PROGRAMS) + len(STEPS) + 1 for record in openings)
    assert all(record["among"] == PARTIES[:world_size] for record in openings[0])
