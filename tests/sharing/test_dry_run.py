"""Programs declared from shapes: CrypTen's provider, dry runs, and the diagnosis that declares its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl import roles
from mpc_fl.errors import ProtocolError, SecrecyError
from mpc_fl.sharing.correlated_randomness import Request
from tests.support.dealing import FRAMES, additive, deal_all, note_frame, run_of
from tests.support.harness import run_parties


def test_the_provider_serves_all_that_crypten_asks_for() -> None:
    from mpc_fl.sharing.crypten_parts import Provider, crypten

    TupleProvider = crypten.mpc.provider.provider.TupleProvider  # noqa: N806 - CrypTen's name
    for name in TupleProvider.TRACEABLE_FUNCTIONS:
        assert callable(vars(Provider)[name]), name
    interface = {
        name for name in vars(TupleProvider) if not name.startswith("_") and callable(getattr(TupleProvider, name))
    }
    assert interface <= set(vars(Provider))
    with pytest.raises(SecrecyError, match="neither traced nor kept"):
        Provider(None, 0).save_cache()  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_the_provider_puts_tuples_where_crypten_computes(device: str | None) -> None:
    from mpc_fl.sharing.crypten_parts import Provider

    class Local:
        def shares(self, request: Request) -> list[torch.Tensor]:
            return [torch.zeros(shape, dtype=torch.int64) for shape in (*request.shapes, request.corrected_shape)]

    provider = Provider(Local(), 0)
    tuples = [
        provider.generate_additive_triple((2, 3), (3, 4), "matmul", device=device),
        provider.generate_additive_triple(
            (1, 2, 5, 5), (2, 2, 3, 3), "conv2d", device=device, padding=[1, 1], stride=2
        ),
        provider.square((2,), device=device),
        provider.generate_binary_triple((2, 1), (3,), device=device),
        provider.wrap_rng((4,), device=device),
        provider.B2A_rng((4,), device=device),
    ]
    shapes_of = [[tuple(tensor.share.shape) for tensor in parts] for parts in tuples]
    assert shapes_of[:2] == [[(2, 3), (3, 4), (2, 4)], [(1, 2, 5, 5), (2, 2, 3, 3), (1, 2, 3, 3)]]
    assert shapes_of[2:] == [[(2,)] * 2, [(2, 1), (3,), (2, 3)], [(4,)] * 2, [(4,)] * 2]
    assert {tensor.share.device.type for parts in tuples for tensor in parts} == {device or "cpu"}
    arithmetic, binary = tuples[-1]
    assert type(arithmetic).__name__ == "ArithmeticSharedTensor" and type(binary).__name__ == "BinarySharedTensor"
    with pytest.raises(ProtocolError, match="by position"):
        provider.generate_additive_triple((1, 1, 5, 5), (1, 1, 3, 3), "conv2d", device, None)


NETWORKS = ["small_cnn", "Functional", "gelu_norms", "frozen_first"]


def declared_inference(links: Any, directory: str, parties: int) -> Any:
    """Networks with every kind of layer: declared from shapes, then run once; the largest error against plaintext."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.inference.reference import network as inference
    from mpc_fl.inference.reference.diagnosis import requests_of
    from mpc_fl.sharing.crypten_parts import crypten
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from tests.inference.reference import test_network as test_inference_graph

    world = [f"party-{rank}" for rank in range(parties)]
    if links.name == "dealer":
        deal_all(links)
        return [payload["kind"] for peer, _, tag, payload in FRAMES if peer == world[0] and tag == "dealer control"]
    errors = {}
    with CrypTenRuntime(links, world, "dealer", 16) as runtime:
        runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        assert runtime.dealer_client is not None
        torch.set_grad_enabled(False)
        for name in NETWORKS:
            torch.manual_seed(1)
            build = getattr(test_inference_graph, name)
            model = build((3, 16, 16), 3) if name == "small_cnn" else build()
            model = test_inference_graph.calibrated(model, 3, 16, 16)
            images = torch.randn(2, 3, 16, 16)
            graph = inference.build_graph(model)
            runtime.dealer_client.declare(name, requests_of(graph, images.shape, parties, 16))
            encrypted = graph.encrypt(src=parties - 1)
            with runtime.dealer_client.program(name):
                logits = encrypted.forward(crypten.cryptensor(images, src=0))
            errors[name] = float((logits.get_plain_text() - model(images)).abs().max())
        dropout = crypten.nn.Dropout(0.5).encrypt()
        kept = dropout(crypten.cryptensor(torch.ones(64), src=0)).get_plain_text()
    return {**errors, "dropout": sorted(set(kept.round(decimals=2).tolist()))}


@pytest.mark.processes
@pytest.mark.parametrize("parties", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_dry_run_declares_exactly_what_the_network_asks_for(parties: int, tmp_path: Path) -> None:
    """The party checks every tuple against the declaration and would stop. No tuple is asked for alone."""
    names = [f"party-{rank}" for rank in range(parties)] + ["dealer"]
    results = run_parties(declared_inference, names, tmp_path, str(tmp_path), parties, observer=note_frame)
    assert results["dealer"][: 2 * len(NETWORKS)] == ["declare", "run"] * len(NETWORKS)
    for errors in run_of(results):
        # CrypTen's public dropout mask is the same at every party, or the shares would add up to something in between.
        assert errors.pop("dropout") == [0, 2]
        assert list(errors) == NETWORKS and max(errors.values()) < 0.02, errors


def test_a_dry_run_draws_nothing_and_opens_nothing() -> None:
    from mpc_fl.sharing import dry_run
    from mpc_fl.sharing.crypten_parts import crypten

    def multiply_and(then: Any) -> Any:
        product = dry_run.shape_share((2, 3), 16) * dry_run.shape_share((3,), 16)
        assert product.share.is_meta and tuple(product.size()) == (2, 3)
        return then(product)

    original = crypten.mpc.get_default_provider
    before = torch.random.get_rng_state()
    requests_seen = dry_run.record_requests(lambda: multiply_and(lambda product: product.relu()), 2, 16)
    assert torch.equal(before, torch.random.get_rng_state())
    assert requests_seen[0] == additive("mul", (2, 3), (3,)) and requests_seen[-1] == additive("mul", (2, 3), (2, 3))
    with pytest.raises(SecrecyError, match="nothing to open"):
        dry_run.record_requests(lambda: multiply_and(lambda product: product.get_plain_text()), 2, 16)
    assert crypten.mpc.get_default_provider is original


def diagnosing(links: Any, directory: str) -> Any:
    """Three images in batches of two; some logits of the first batch lie beyond the hospital's bound."""
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.config.config import parse_config
    from mpc_fl.inference.reference import diagnosis
    from mpc_fl.learning.data.dataset import Dataset
    from mpc_fl.learning.models.architectures import build_model
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime

    if links.name == "dealer":
        from mpc_fl.sharing.dealer import Dealer

        Dealer(links, [roles.HOSPITAL, roles.MODEL_OWNER]).serve()
        control = [payload for peer, _, tag, payload in FRAMES if (peer, tag) == ("hospital-0", "dealer control")]
        return [(payload["kind"], payload.get("program"), payload.get("following")) for payload in control]
    values = {"task": "infer", "data": {"source": "images", "image_size": 16, "channels": 1},
              "model": {"architecture": "small_cnn"}, "inference": {"batch_size": 2}}  # fmt: skip
    config = parse_config(values, "test")
    model = build_model(config)
    world = [roles.HOSPITAL, roles.MODEL_OWNER]
    with CrypTenRuntime(links, world, "dealer", 16) as runtime:
        domain = runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name))
        if links.name == roles.MODEL_OWNER:
            return diagnosis.answer(config, diagnosis.private_graph(config, model), domain)
        images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        largest = model(images).abs().amax(dim=1)
        images, largest = images[largest.argsort(descending=True)], largest.sort(descending=True).values
        config = config.with_values(inference={"logit_bound": float(largest[:2].mean())})
        dataset = Dataset(images, torch.zeros(3, dtype=torch.int64), torch.arange(3), ("a", "b", "c"))
        found = diagnosis.ask(config, diagnosis.public_graph(config), dataset, domain, lambda *_: None)
        error = float((torch.stack([one.logits for one in found]) - model(images)).abs().max())
        return error, [one.doubt for one in found]


@pytest.mark.processes
def test_a_batch_with_a_doubtful_result_is_followed_like_any_other(tmp_path: Path) -> None:
    results = run_parties(
        diagnosing, ["hospital-0", "model-owner", "dealer"], tmp_path, str(tmp_path), observer=note_frame
    )
    error, doubts = results["hospital-0"]
    assert error < 0.01 and results["model-owner"] == 2
    assert "logit_bound" in doubts[0] and doubts[1:] == [None, None]
    two, one = "batch of 2", "batch of 1"
    # The first batch is prepared before the weights are shared. The run after it was prepared for the next batch.
    assert results["dealer"] == [
        ("declare", two, None),
        ("prepare", two, None),
        ("declare", one, None),
        ("run", two, one),
        ("run", one, ""),
        ("finish", None, None),
    ]
