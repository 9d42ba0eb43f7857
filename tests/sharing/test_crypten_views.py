"""CrypTen's tensors of every layout, in real processes: openings, products, comparisons, training, the provider's calls.

Shares that are views (of any strides, without elements, without dimensions) give what the plaintext gives, for two parties
and three, whose truncations differ; the shares they are views of stay as they are. The same without CrypTen: `test_views`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.support.harness import run_parties
from tests.support.views import LAYOUTS

pytestmark = pytest.mark.processes

PARTIES = ["party-0", "party-1", "party-2"]
FRACTION_BITS = 16
TOLERANCE = 0.01  # truncations of products below 64, and twice a unit of the encoding


def plain() -> torch.Tensor:
    return torch.linspace(-4, 4, 24).reshape(4, 6)


def within(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    assert found.shape == expected.shape, f"{where}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert not found.numel() or float((found.double() - expected.double()).abs().max()) <= TOLERANCE, where


# ---- openings and computations -----------------------------------------------------------------------------------------

COMPUTATIONS: dict[str, Callable[[Any], Any]] = {
    "sum with itself": lambda x: x + x,
    "product": lambda x: x * x,
    "product with public": lambda x: x * 0.5,
    "square": lambda x: x.square(),
    "quotient by public": lambda x: x / 4,
    "comparison": lambda x: x > 0,
    "rectified": lambda x: x.relu(),
    "flattened": lambda x: x.reshape(-1),
}


def layouts_of(crypten: Any, name: str, world: list[str], rank: int) -> None:
    """One layout: opened to all and to one, as sum and as bits, then every computation."""
    layout = LAYOUTS[name]
    secret = crypten.cryptensor(plain(), src=0)
    before = secret.share.clone()

    def viewed() -> Any:
        return crypten.mpc.MPCTensor.from_shares(layout(secret.share), precision=FRACTION_BITS)

    value = layout(plain())
    for _ in range(2):
        within(viewed().get_plain_text(), value, f"{name}, opened to all")
        to_one = viewed().get_plain_text(dst=len(world) - 1)
        assert (to_one is None) == (rank != len(world) - 1)
        if to_one is not None:
            within(to_one, value, f"{name}, opened to one")
            assert to_one.is_contiguous()
    revealed = viewed().reveal()
    assert revealed.dtype == torch.int64
    within(revealed.double() / 2**FRACTION_BITS, value, f"{name}, revealed")
    bits = crypten.mpc.primitives.BinarySharedTensor(torch.arange(24).reshape(4, 6) * 3, src=0).share
    binary = crypten.mpc.MPCTensor.from_shares(layout(bits), precision=0, ptype=crypten.mpc.binary)
    assert torch.equal(binary.get_plain_text(), layout(torch.arange(24).reshape(4, 6) * 3)), name
    for what, computation in COMPUTATIONS.items():
        expected = computation(value) if what != "comparison" else (value > 0).float()
        within(computation(viewed()).get_plain_text(), expected, f"{name}, {what}")
    if value.dim() == 2:
        product = viewed().matmul(viewed().t())
        within(product.get_plain_text(), value.matmul(value.t()), f"{name}, matrix product")
        within(product.t().get_plain_text(), value.matmul(value.t()).t(), f"{name}, matrix product transposed")
    assert torch.equal(secret.share, before), f"{name}: the share that was viewed has changed"


def training(crypten: Any) -> None:
    """Gradients of a convolution, a sum over windows, and inputs that come in transposed, opened as they are."""
    image, kernel = plain().reshape(2, 1, 3, 4).transpose(2, 3), torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
    linear = torch.linspace(-1, 1, 36).reshape(3, 12)
    parameters = [kernel.clone().requires_grad_(), linear.clone().requires_grad_()]
    features = functional.conv2d(image, parameters[0]).relu()
    features.flatten(1).matmul(parameters[1].t()).square().sum().backward()
    images = crypten.cryptensor(plain().reshape(2, 1, 3, 4), src=0).transpose(2, 3)
    secret = [crypten.cryptensor(parameter.detach(), src=1, requires_grad=True) for parameter in parameters]
    hidden = images.conv2d(secret[0]).relu()
    hidden.flatten(1).matmul(secret[1].t()).square().sum().backward()
    for parameter, own in zip(parameters, secret, strict=True):
        assert parameter.grad is not None
        error = (own.grad.get_plain_text() - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 0.01, f"gradient of {tuple(parameter.shape)}: {error}"


def computing(links: Any, directory: str, world: list[str]) -> str:
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer

    if links.name == "dealer":
        Dealer(links, world).serve()
        return "served"
    with CrypTenRuntime(links, world, "dealer", FRACTION_BITS) as runtime:
        runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        for name in LAYOUTS:
            layouts_of(crypten, name, world, runtime.rank)
        training(crypten)
    return "computed"


@pytest.mark.parametrize("parties", [2, 3])
def test_shares_of_every_layout_give_what_the_plaintext_gives(parties: int, tmp_path: Path) -> None:
    world = PARTIES[:parties]
    results = run_parties(computing, [*world, "dealer"], tmp_path, str(tmp_path), world)
    assert results == {**dict.fromkeys(world, "computed"), "dealer": "served"}


# ---- the provider ------------------------------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3,), (2, 0, 3), (1, 1), (2, 3)]
PRODUCTS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("mul", (), (2, 3), {}),
    ("mul", (2, 1), (0,), {}),
    ("matmul", (3,), (3,), {}),
    ("matmul", (2, 0), (0, 3), {}),
    ("matmul", (0, 2), (2, 3), {}),
    ("matmul", (1, 1), (1, 1), {}),
    ("conv1d", (0, 2, 5), (3, 2, 2), {"padding": 1}),
    ("conv2d", (1, 1, 3, 3), (1, 1, 3, 3), {}),
    ("conv_transpose2d", (1, 2, 2, 2), (2, 1, 2, 2), {"stride": 2}),
]


def every_tuple(crypten: Any, provider: Any) -> None:
    """All kinds of tuples in all shapes: each fulfils its equation, also after CrypTen has overwritten those before."""
    kept: list[torch.Tensor] = []

    def opened(*shared: Any) -> list[torch.Tensor]:
        values = [one.reveal() for one in shared]
        for one in shared:
            assert one.share.is_contiguous() and one.share.dtype == torch.int64
            one.share.fill_(-1)  # as CrypTen, which computes in place
            kept.append(one.share)
        return values

    for shape in SHAPES:
        r, r2 = opened(*provider.square(torch.Size(shape)))
        assert r.shape == shape and torch.equal(r2, r * r)
        bit, same = opened(*provider.B2A_rng(torch.Size(shape)))
        assert bit.shape == shape and torch.equal(bit, same) and bool(((bit == 0) | (bit == 1)).all())
        a, b, c = opened(*provider.generate_binary_triple(torch.Size(shape), torch.Size(shape)))
        assert c.shape == shape and torch.equal(c, a & b)
        shared = provider.wrap_rng(torch.Size(shape))
        of_all = crypten.communicator.get().all_gather(shared[0].share)
        _, theta = opened(*shared)
        assert theta.shape == shape and torch.equal(theta, crypten.common.util.count_wraps(of_all))
    for operation, first, second, options in PRODUCTS:
        a, b, c = opened(*provider.generate_additive_triple(first, second, operation, None, **options))
        assert torch.equal(c, getattr(torch, operation)(a, b, **options)), (operation, first, second)
    assert all(bool((share == -1).all()) for share in kept), "a tuple was handed out with memory of another one"


def providing(links: Any, directory: str, world: list[str]) -> str:
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from mpc_fl.sharing.dealer import Dealer
    from mpc_fl.sharing.dry_run import record_requests, shape_share

    if links.name == "dealer":
        Dealer(links, world).serve()
        return "served"
    with CrypTenRuntime(links, world, "dealer", FRACTION_BITS) as runtime:
        assert runtime.dealer_client is not None
        provider = crypten.mpc.get_default_provider()
        every_tuple(crypten, provider)
        with runtime.dealer_client.program("followed"):
            every_tuple(crypten, provider)
        with runtime.dealer_client.program("followed"):  # declared by now: corrections come as parts of blocks
            every_tuple(crypten, provider)
        # What a dry run on shapes foresees for views is what a run on them asks for.
        runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))

        def on_views(x: Any) -> list[Any]:
            views = [crypten.mpc.MPCTensor.from_shares(layout(x.share), precision=16) for layout in LAYOUTS.values()]
            return [computation(view) for view in views for computation in COMPUTATIONS.values()]

        foreseen = record_requests(lambda: on_views(shape_share((4, 6), FRACTION_BITS)), len(world), FRACTION_BITS)
        runtime.dealer_client.declare("views", foreseen)
        secret = crypten.cryptensor(plain(), src=0)
        with runtime.dealer_client.program("views"):
            results = on_views(secret)
        expected = on_views_in_the_clear()
        for result, value in zip(results, expected, strict=True):
            within(result.get_plain_text(), value, "in a program")
    return "provided"


def on_views_in_the_clear() -> list[torch.Tensor]:
    values = [layout(plain()) for layout in LAYOUTS.values()]
    return [computation(value).float() for value in values for computation in COMPUTATIONS.values()]


@pytest.mark.parametrize("parties", [2, 3])
def test_tuples_of_every_kind_and_shape_are_right_and_apart(parties: int, tmp_path: Path) -> None:
    world = PARTIES[:parties]
    results = run_parties(providing, [*world, "dealer"], tmp_path, str(tmp_path), world)
    assert results == {**dict.fromkeys(world, "provided"), "dealer": "served"}
