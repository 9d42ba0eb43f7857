"""The engine `fast`: hospital, model owner and dealer, as threads over links in memory, and once between real processes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError, ProtocolError, SecrecyError
from mpc_fl.inference.fast.kernels.bit_planes import packed_bytes
from mpc_fl.inference.fast.kernels.linear import linear_maps
from mpc_fl.inference.fast.layers import (
    Add,
    AveragePool,
    Concatenate,
    Convolution,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
    SignExtension,
)
from mpc_fl.inference.fast.messages import batch_from, describe, hospital_seed, network_from
from mpc_fl.inference.fast.network import IntegerModel, IntegerWeights, Network, Value, label_bits
from mpc_fl.inference.fast.online.hospital_session import HospitalSession
from mpc_fl.inference.fast.online.owner_session import OwnerSession, SessionTerms
from mpc_fl.inference.fast.preprocessing.correlations import (
    corrections_of,
    correlation_plan,
    hospital_correlations,
    owner_correlations,
    split_corrections,
)
from mpc_fl.inference.fast.preprocessing.cost import cost_of
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.quantization.calibration import calibrate
from mpc_fl.inference.fast.quantization.emulation import Emulator
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import run_parties, run_parties_in_memory

HOSPITAL, OWNER = "hospital-0", "model-owner"
NAMES = [HOSPITAL, OWNER, "dealer"]
CLASSES = 5
FALSE_ALARM = 1e-9


def small_network() -> Network:
    """Every kind of layer: convolution, max-pool, ReLU, residual block, concatenation, pooling, extension, linear."""
    unit = 2.0**-12
    wide, narrow = (lambda *shape: Value(shape, 32, unit)), (lambda *shape: Value(shape, 20, unit))
    product = 2.0**-24
    values = {
        "image": wide(3, 13, 11),
        "conv1": narrow(8, 7, 6),
        "pool1": narrow(8, 4, 3),
        "relu1": wide(8, 4, 3),
        "conv2": narrow(8, 4, 3),
        "relu2": wide(8, 4, 3),
        "conv3": Value((8, 4, 3), 32, product),
        "add": narrow(8, 4, 3),
        "relu3": wide(8, 4, 3),
        "depthwise": narrow(8, 4, 3),
        "relu6": wide(8, 4, 3),
        "point": narrow(4, 4, 3),
        "extended": wide(4, 4, 3),
        "mixed": narrow(4, 4, 3),
        "relu4": wide(4, 4, 3),
        "cat": wide(16, 4, 3),
        "average": Value((16, 2, 2), 32, unit / 4),
        "flat": Value((64,), 32, unit / 4),
        "logits": Value((CLASSES,), 20, unit / 4),
    }
    layers = (
        Convolution("conv1", ("image",), "conv1", 12, (8, 3, 3, 3), (2, 2), (1, 1)),
        MaxPool("pool1", ("conv1",), "pool1", 0, (3, 3), (2, 2), (1, 1, 1, 1)),
        ReLU("relu1", ("pool1",), "relu1"),
        Convolution("conv2", ("relu1",), "conv2", 12, (8, 8, 3, 3), (1, 1), (1, 1)),
        ReLU("relu2", ("conv2",), "relu2"),
        Convolution("conv3", ("relu2",), "conv3", 0, (8, 8, 3, 3), (1, 1), (1, 1)),
        Add("add", ("conv3", "relu1"), "add", 12, (1, 4096), 77),
        ReLU("relu3", ("add",), "relu3"),
        Convolution("depthwise", ("relu3",), "depthwise", 12, (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8),
        ReLU("relu6", ("depthwise",), "relu6", ceiling=6 << 12),
        Convolution("point", ("relu3",), "point", 12, (4, 8, 1, 1)),
        SignExtension("extended", ("point",), "extended"),
        Convolution("mixed", ("extended",), "mixed", 12, (4, 4, 1, 1)),
        ReLU("relu4", ("mixed",), "relu4"),
        Concatenate("cat", ("relu6", "extended", "relu4"), "cat"),
        AveragePool("average", ("cat",), "average", 0, (2, 2), (2, 2), (0, 0, 0, 1)),
        Flatten("flat", ("average",), "flat"),
        Linear("fc", ("flat",), "logits", 12, (CLASSES, 64)),
    )
    return Network(layers, values, "image", "logits")


def random_weights(network: Network) -> IntegerWeights:
    weights, biases = {}, {}
    generator = torch.Generator().manual_seed(3)
    for layer in network.linear_layers:
        fan_in = int(np.prod(layer.weight_shape[1:]))
        real = torch.randn(layer.weight_shape, generator=generator) * (2.0 / fan_in) ** 0.5
        weights[layer.output] = torch.round(real * 4096).to(torch.int32)
        biases[layer.output] = torch.randint(-(1 << 20), 1 << 20, layer.weight_shape[:1], generator=generator).int()
    return IntegerWeights(weights, biases)


def model_of(network: Network, integers: IntegerWeights) -> IntegerModel:
    return IntegerModel(network, Private("integer weights", integers))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(9).uniform(-1, 1, (count, 3, 13, 11)).astype(np.float32)


@dataclass
class Session:
    """What one party saw of a session."""

    results: list[np.ndarray] = field(default_factory=list)
    shares: list[dict[str, np.ndarray]] = field(default_factory=list)
    evaluated: int = 0
    sequential_messages: int = 0
    bytes_sent: int = 0
    events: list[tuple[str, str]] = field(default_factory=list)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Views:
    """What every party receives, in order: (sender, tag, payload)."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[str, str, Any]]] = {name: [] for name in NAMES}

    def watch(self, network: InMemoryNetwork) -> None:
        network.watch(self._remember)

    def _remember(self, sender: str, receiver: str, frame: Frame) -> None:
        if isinstance(frame.payload, torch.Tensor):
            self.of[receiver].append((sender, frame.tag, frame.payload.clone().numpy()))
        elif frame.kind == Kind.OBJECT:
            self.of[receiver].append((sender, frame.tag, frame.payload))


def note_order(links: Any, events: list[tuple[str, str]]) -> None:
    """Keep in which order this party sends and receives tensors of the phase `online`."""

    def noting(event: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(peer: str, tag: str, *rest: Any) -> Any:
            result = method(peer, tag, *rest)
            if tag == "opening" or tag.split()[0] in ("E", "masked") and tag.split()[1].isdigit():
                events.append((event, tag))
            return result

        return call

    links.send_tensor, links.receive_tensor = noting("send", links.send_tensor), noting("receive", links.receive_tensor)


def longest_chain(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> int:
    """Most messages in sequence, each sent after the one before was received, from what both parties did in order."""
    depths, places = [0, 0], [0, 0]
    in_flight: list[dict[str, list[int]]] = [{}, {}]  # to each party, by tag: the depths of messages
    logs = (one, other)
    while places != [len(one), len(other)]:
        moved = False
        for party in (0, 1):
            while places[party] < len(logs[party]):
                event, tag = logs[party][places[party]]
                if event == "send":
                    in_flight[1 - party].setdefault(tag, []).append(depths[party] + 1)
                elif in_flight[party].get(tag):
                    depths[party] = max(depths[party], in_flight[party][tag].pop(0))
                else:
                    break
                places[party], moved = places[party] + 1, True
        assert moved, "a message was received that nobody sent"
    return max(depths)


def session(
    links: Links,
    make: Callable[[], tuple[Network, IntegerWeights]],
    batches: list[Any],
    reveal: str,
    directory: str,
    together: bool = False,
) -> Session:
    """One party: all batches prepared first, then evaluated one after the other or together."""
    seen = Session()
    if links.name == "dealer":
        seen.evaluated = deal(links, HOSPITAL, OWNER)
        return seen
    note_order(links, seen.events)
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    domain = SecretDomain(links, [HOSPITAL, OWNER], record)
    if links.name == OWNER:
        terms = SessionTerms(reveal, at_once=len(batches))  # type: ignore[arg-type]
        owner = OwnerSession(domain, HOSPITAL, model_of(*make()), terms)
        seen.evaluated = owner.serve()
        seen.bytes_sent = links.traffic["online"][HOSPITAL].bytes_sent
        return seen
    hospital = HospitalSession(domain, reveal)  # type: ignore[arg-type]
    sizes = [len(records) for records in batches]  # of batches together each has its own: so shares are told apart

    def note(name: str, share: np.ndarray) -> None:
        seen.shares[sizes.index(len(share)) if together else -1].update({name: share.astype(np.int64)})

    hospital.on_truncation = note
    for size in sizes:
        hospital.prepare(size)
    for group in [batches] if together else [[records] for records in batches]:
        seen.shares.extend({} for _ in group)
        found = hospital.diagnose_together([torch.from_numpy(records) for records in group])
        seen.results.extend(result.numpy() for result in found)
    with pytest.raises(SecrecyError, match="no correlated randomness"):
        hospital.diagnose(torch.from_numpy(batches[-1]))
    hospital.finish()
    seen.sequential_messages = hospital.sequential_messages
    seen.bytes_sent = links.traffic["online"][OWNER].bytes_sent
    return seen


def small() -> tuple[Network, IntegerWeights]:
    return small_network(), random_weights(small_network())


class Residual(nn.Module):
    """Convolution, ReLU, pooling, a residual block without last ReLU, concatenation, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 2)
        y = x + self.left(x)
        z = torch.cat([functional.relu(y), functional.relu(self.right(y))], dim=1)
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(z, 1), 1))


def residual_model() -> nn.Module:
    torch.manual_seed(5)
    return Residual().eval()


def calibrated() -> tuple[Network, IntegerWeights]:
    calibration = calibrate(residual_model(), torch.from_numpy(images(32)))
    return calibration.network, calibration.weights.inside_protocol()


@pytest.mark.parametrize(
    ("make", "together", "in_memory"),
    [
        (small, False, True),
        (small, True, True),
        pytest.param(calibrated, False, False, marks=pytest.mark.processes),
    ],
)
def test_logits_equal_the_emulation_bit_for_bit(
    make: Callable[[], tuple[Network, IntegerWeights]], together: bool, in_memory: bool, tmp_path: Path
) -> None:
    batches = [images(3)[:2], images(3)[2:]]
    arguments = (make, batches, "logits", str(tmp_path), together)
    if in_memory:
        got = run_parties_in_memory(session, NAMES, *arguments)
    else:
        got = run_parties(session, NAMES, tmp_path, *arguments)
    network, integers = make()
    emulator = Emulator(network, integers)
    hospital = got[HOSPITAL]
    for records, logits, shares in zip(batches, hospital.results, hospital.shares, strict=True):
        assert set(shares) == {layer.output for layer in network.layers if layer.shift}
        exact = emulator.logits(torch.from_numpy(records), tensors(shares))
        assert torch.equal(torch.from_numpy(logits), exact)
        if make is calibrated:
            with torch.no_grad():
                plain = residual_model()(torch.from_numpy(records))
            assert float((exact - plain).abs().max()) < 0.02
    assert got[OWNER].evaluated == got["dealer"].evaluated == 2
    # Only the hospital was told, and both wrote it down before.
    for name in (HOSPITAL, OWNER):
        openings = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(one["what"], one["shape"], one["to"]) for one in openings] == [
            ("logits", [2, CLASSES], [HOSPITAL]),
            ("logits", [1, CLASSES], [HOSPITAL]),
        ]


def test_only_the_label(tmp_path: Path) -> None:
    records = images(40)
    got = run_parties_in_memory(session, NAMES, small, [records], "label", str(tmp_path))
    network, integers = small()
    logits = Emulator(network, integers).logits(torch.from_numpy(records), tensors(got[HOSPITAL].shares[0]))
    assert torch.equal(torch.from_numpy(got[HOSPITAL].results[0]), logits.argmax(dim=1))
    assert len(set(got[HOSPITAL].results[0].tolist())) > 1
    openings = [json.loads(line) for line in (tmp_path / f"{HOSPITAL}.jsonl").read_text().splitlines()]
    assert [(one["what"], one["shape"]) for one in openings] == [("label", [40])]


def assert_uniform(values: np.ndarray, what: str) -> None:
    counts = np.bincount(values.view(np.uint8).reshape(-1), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM, what


def test_views_are_uniform_and_say_nothing_of_the_image(tmp_path: Path) -> None:
    """Chi-square on the bytes of each kind of message, a black image and a random one: some 20 p-values, 10^-9 each."""
    views = []
    for records in (np.zeros_like(images(24)), images(24)):
        views.append(Views())
        run_parties_in_memory(session, NAMES, small, [records], "logits", str(tmp_path), prepare=views[-1].watch)
    for view in views:
        to_hospital, to_owner, to_dealer = (view.of[name] for name in NAMES)
        for who, received in ((HOSPITAL, to_hospital), (OWNER, to_owner)):
            by_tag: dict[str, list[np.ndarray]] = {}
            for _, tag, payload in received:
                if isinstance(payload, np.ndarray) and tag != "opening":
                    by_tag.setdefault(tag, []).append(payload.view(np.uint8).reshape(-1))
            kinds = {"masked 0"} | ({"E 0", "correction 0"} if who == OWNER else set())
            assert kinds <= set(by_tag)
            for tag in kinds:
                assert_uniform(np.concatenate(by_tag[tag]), f"{tag} as {who} sees it")
            if who == HOSPITAL:  # F, of all layers
                weights = [np.concatenate(parts) for tag, parts in by_tag.items() if tag.startswith("masked weights")]
                assert_uniform(np.concatenate(weights), "masked weights")
        # The dealer gets no tensor at all; a batch is a number, a size and what will be revealed.
        assert {tag for _, tag, _ in to_dealer} == {"network", "batch"}
        for _, tag, payload in to_dealer:
            if tag == "batch":
                assert set(payload) == {"number", "records", "reveal"}
            else:
                assert "weights" not in payload and set(payload) == {"layers", "values", "input", "output"}
    # Order, tags and sizes of all messages are the same whatever the image.
    shapes = [
        [[(sender, tag, getattr(payload, "shape", None)) for sender, tag, payload in view.of[name]] for name in NAMES]
        for view in views
    ]
    for one, other in zip(*shapes, strict=True):
        assert sorted(map(repr, one)) == sorted(map(repr, other))


def test_cost_follows_from_the_network(tmp_path: Path) -> None:
    """Sequential messages and bytes are those that shapes predict; a batch takes as many messages as one record."""
    network, _ = small()
    got = run_parties_in_memory(session, NAMES, small, [images(3)], "logits", str(tmp_path))
    one, three = cost_of(network, 1), cost_of(network, 3)
    assert longest_chain(got[HOSPITAL].events, got[OWNER].events) == three.sequential_messages
    assert got[HOSPITAL].sequential_messages == three.sequential_messages == one.sequential_messages
    frames = 90 * (3 * 20 + 10)  # headers, at most
    assert 0 <= got[HOSPITAL].bytes_sent - three.bytes_from_hospital <= frames
    assert 0 <= got[OWNER].bytes_sent - three.bytes_from_owner <= frames
    assert three.masked_weight_bytes == one.masked_weight_bytes


def test_network_as_a_message() -> None:
    for network in (small_network(), calibrated()[0]):
        assert network_from(json.loads(json.dumps(describe(network)))) == network


def test_a_ceiling_belongs_to_the_network_that_masks_are_bound_to() -> None:
    """Hospital and dealer that were told different ceilings use different masks; what does not fit is refused."""
    network, drawn = small_network(), []
    for ceiling in (6 << 12, 6 << 11, None):
        changed = [
            dataclasses.replace(each, ceiling=ceiling) if each.path == "relu6" else each for each in network.layers
        ]
        seed = hospital_seed(Seed(bytes(32)), dataclasses.replace(network, layers=tuple(changed)))
        drawn.append(tuple(seed.stream("piece", "relu6").words(4, np.uint32).tolist()))
    assert len(set(drawn)) == 3
    for ceiling in (0, -1, 1 << 19):
        description = json.loads(json.dumps(describe(network)))
        next(layer for layer in description["layers"] if layer["path"] == "relu6")["ceiling"] = ceiling
        with pytest.raises(ProtocolError, match="not valid"):
            network_from(description)


def test_masks_of_an_extended_value_hide_each_bit_once() -> None:
    """x + r and the high bits of E are uniform together, for one fixed x: 2 p-values, 10^-9 each; both follow from A alone."""
    network, _ = small()
    bits, plan = network.values["point"].bits, correlation_plan(network, 1000, "logits")
    gate = plan.extension("extended")
    assert gate is not None and plan.extension("relu1") is None and plan.extension("image") is None
    assert plan.masked_bytes("extended") == packed_bytes(32 - bits, gate.count) < 4 * gate.count / 2
    zeros = {each.output: torch.zeros(each.weight_shape, dtype=torch.int32) for each in network.linear_layers}
    correlations = hospital_correlations(plan, Seed.from_system(), linear_maps(network, zeros))
    mask, material = correlations.masks.take("extended").numpy().view(np.uint32), correlations.gates.take("extended")
    r, low = material.drawn.input_mask, np.uint32((1 << bits) - 1)
    assert np.array_equal((r + mask.reshape(-1)) & low, np.zeros_like(r))
    at_zero, _ = material.corrected.arrays
    high = (at_zero - (mask.reshape(-1) >> np.uint32(bits))) & np.uint32((1 << 32 - bits) - 1)
    digit = np.uint32(15)
    for one, other in ((r >> np.uint32(bits - 4), high >> np.uint32(28 - bits)), (r & digit, high & digit)):
        part = (one << np.uint32(4)) | other
        counts = np.bincount(part.astype(np.int64), minlength=256)
        assert stats.chisquare(counts).pvalue > FALSE_ALARM


@given(st.data())
def test_a_malformed_network_is_refused(data: st.DataObject) -> None:
    description = json.loads(json.dumps(describe(small_network())))
    layer = data.draw(st.sampled_from(description["layers"]))
    place: dict[str, Any] = data.draw(st.sampled_from([layer, description["values"][layer["output"]]]))
    key = data.draw(st.sampled_from(sorted(set(place) - {"path", "scale"})))
    place[key] = data.draw(st.sampled_from([None, -1, 1 << 40, "x", [], [1], [-1, 2, 3, 3], {}, 0.5, True]))
    try:
        network_from(description)
    except ProtocolError as error:
        assert "not valid" in str(error)
    else:  # few changes give another valid network
        assert key in ("constant", "weight_bits", "multiplier") or (key, place[key]) == ("ceiling", None)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.sampled_from([0, 1, -1, 5000, "logits", "label", None, True])
            for name in ("number", "records", "reveal")
        },
    )
)
def test_a_malformed_batch_is_refused(message: dict[str, Any]) -> None:
    try:
        records, reveal = batch_from(message, 1)
    except ProtocolError:
        return
    assert message["number"] == 1 and 0 <= records <= 1024 and reveal in ("logits", "label")


def test_a_used_up_correlation_is_refused() -> None:
    network, integers = small()
    plan = correlation_plan(network, 1, "logits")
    masked = linear_maps(network, integers.weights)
    correlations = hospital_correlations(plan, Seed.from_system(), masked)
    for pieces in (correlations.masks, correlations.products, correlations.gates):
        name = next(iter(pieces._pieces))
        pieces.take(name)
        with pytest.raises(SecrecyError, match="used already"):
            pieces.take(name)
    seed = Seed.from_system()
    hospital_correlations(plan, seed, masked)
    with pytest.raises(SecrecyError, match="used twice"):  # nor are they made twice
        hospital_correlations(plan, seed, masked)


def test_corrections_in_one_buffer() -> None:
    """What a pool stores: the same bytes, in order of use."""
    network, integers = small()
    plan = correlation_plan(network, 2, "label")
    maps = linear_maps(network, integers.weights)
    keys = [Seed.from_system().reveal_for_transport() for _ in range(2)]
    buffer = np.zeros(plan.stored_bytes, dtype=np.uint8)
    for name, correction in corrections_of(plan, Seed(keys[0]), Seed(keys[1]), maps):
        split_corrections(plan, buffer)[name][:] = correction
    views = split_corrections(plan, buffer.copy())
    assert list(views) == list(plan.pieces) and sum(map(len, views.values())) == plan.correction_bytes
    for name, correction in corrections_of(plan, Seed(keys[0]), Seed(keys[1]), maps):
        assert np.array_equal(views[name], correction)
    with pytest.raises(ValueError, match="another size"):
        split_corrections(plan, buffer[:-1])
    owned = owner_correlations(plan, Seed(keys[1]), views)
    assert owned.gates.left + owned.products.left == len(plan.pieces)


def refuse(links: Links, reveal: str, counts: list[int]) -> str:
    """The owner agreed to logits, two records and two batches at once; whoever asks for more ends the session."""
    if links.name == "dealer":
        deal(links, HOSPITAL, OWNER)
    record = OpeningRecord(Path(os.devnull), links.name)
    domain = SecretDomain(links, [HOSPITAL, OWNER], record)
    if links.name == HOSPITAL:
        hospital = HospitalSession(domain, reveal)  # type: ignore[arg-type]
        for count in counts:
            hospital.prepare(count)
    OwnerSession(domain, HOSPITAL, model_of(*small()), SessionTerms(largest_batch=2, at_once=2)).serve()
    return "served"


@pytest.mark.parametrize(("reveal", "counts"), [("label", [1]), ("logits", [3]), ("logits", [1, 2, 1])])
def test_what_was_not_agreed_is_refused(reveal: str, counts: list[int]) -> None:
    with pytest.raises(AssertionError, match="ProtocolError: the hospital asked for a batch or result not agreed"):
        run_parties_in_memory(refuse, NAMES, reveal, counts)


def test_the_hospitals_product_share_is_masked() -> None:
    """z_C - F * A = u_C is uniform, for zero weights too; without it, the owner who knows B could solve A * B for A."""
    network, integers = small()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in integers.weights.items()}
    for weights in (zeros, integers.weights):
        maps, seed = linear_maps(network, weights), Seed.from_system()
        correlations = hospital_correlations(correlation_plan(network, 60, "logits"), seed, maps)
        masks = {name: correlations.masks.take(name) for name in list(correlations.masks._pieces)}
        for layer in network.linear_layers:
            share = correlations.products.take(layer.output) - maps[layer.output](masks[layer.inputs[0]])
            assert_uniform(share.numpy(), layer.path)
        assert_uniform(np.concatenate([mask.numpy().reshape(-1) for mask in masks.values()]), "A")


def test_too_many_classes_for_a_label() -> None:
    network, _ = small()
    assert label_bits(network) == (20, 3)
    values = {**network.values, "logits": Value((CLASSES,), 22, 2.0**-12)}
    wider = Network(
        (*network.layers[:-1], dataclasses.replace(network.layers[-1], shift=10)), values, "image", "logits"
    )
    with pytest.raises(ModelError, match="do not fit a comparison"):
        correlation_plan(wider, 1, "label")
