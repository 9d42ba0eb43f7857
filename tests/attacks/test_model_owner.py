"""A model owner that deviates, against hospitals and dealers that do not: what it receives says nothing of an image.

Each attack is made on two images that differ in what it asks about. All that the hospital sends, and how it ends, must be the
same for both but for values, and these must be uniform. Statistical tests have a false-alarm rate of 1e-9 each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import MpcFlError
from mpc_fl.inference.diagnosis import request_diagnoses
from mpc_fl.inference.fast.kernels.bit_planes import unpack
from mpc_fl.inference.fast.layers import Add, Convolution, Flatten, Layer, Linear, ReLU, SignExtension
from mpc_fl.inference.fast.messages import BATCH, NETWORK, READY, STEP, WEIGHTS, correction_tag, describe
from mpc_fl.inference.fast.network import IntegerModel, IntegerWeights, Network, Value
from mpc_fl.inference.fast.online.hospital_session import HospitalSession
from mpc_fl.inference.fast.online.owner_session import OwnerSession, SessionTerms
from mpc_fl.inference.fast.preprocessing.correlations import correlation_plan
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.roles import DEALER, HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import SPAWN, run_parties_in_memory

NAMES = [HOSPITAL, MODEL_OWNER, DEALER]
SIZE, CLASSES = 16, 3
FALSE_ALARM = 1e-9


def nothing(*_: object) -> None:
    pass


def await_the_end(links: Links) -> None:
    """Stay until the hospital has said how it ends."""
    while links.alive(HOSPITAL):
        links.await_change(1.0)


# ---- engine reference: a model whose logits exceed the bound when the image is bright ----------------------------------


REFERENCE = {
    "task": "infer",
    "data": {"source": "images", "image_size": SIZE, "channels": 1},
    "model": {"architecture": "mlp", "hidden": [8]},
    "inference": {"engine": "reference", "logit_bound": 4096.0},
}


def a_model_that_asks(config: Config) -> torch.nn.Module:
    """A logit is 2^13 times what the mean pixel exceeds 1/2 by, times two: 8192 for white, 0 for black."""
    model = build_model(config)
    first, last = model[1], model[3]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first.weight[0] = 1 / SIZE**2
        first.bias[0] = -0.5
        last.weight[0, 0] = 2.0**14
    return model


def party(name: str, values: dict[str, Any], directory: str) -> None:
    """The real program of hospital and dealer; of the model owner one that keeps all frames until the others have ended."""
    from mpc_fl.apps.runs.party_process import run_alone

    config, told = parse_config(values, name), Path(directory) / f"{name}.told"
    try:
        if name == MODEL_OWNER:
            curious_owner(config, Path(directory))
        else:
            run_alone(name, config, nothing)
    except MpcFlError as error:
        told.write_text(str(error))
        raise SystemExit(error.exit_code) from None


def curious_owner(config: Config, directory: Path) -> None:
    from mpc_fl.inference.diagnosis import answer_requests
    from mpc_fl.links.party_links import connect

    frames: list[tuple[str, str, str, Any]] = []

    def keep(peer: str, frame: Frame) -> None:
        payload = frame.payload.clone() if isinstance(frame.payload, torch.Tensor) else frame.payload
        frames.append((peer, frame.kind.name, frame.tag, payload))

    assert config.site.model is not None
    links = connect(config, MODEL_OWNER, keep)
    try:
        with links:
            record = OpeningRecord(directory / "owner.jsonl", MODEL_OWNER)
            answer_requests(config, load_model(config.site.model, config), links, record)
            await_the_end(links)
    finally:
        torch.save([frame for frame in frames if frame[0] == HOSPITAL], directory / "frames.pt")


def run_programs(directory: Path, pictures: list[int]) -> tuple[list[Any], dict[str, int | None], str]:
    """Diagnose pictures of one grey value each: frames that the owner got, exit codes, the hospital's last line."""
    from PIL import Image

    from mpc_fl.apps.runs.local_parties import place_parties

    (directory / "images").mkdir(parents=True)
    for place, value in enumerate(pictures):
        Image.fromarray(np.full((SIZE, SIZE), value, dtype=np.uint8)).save(directory / "images" / f"{place}.png")
    config = parse_config(REFERENCE, "test")
    save_model(directory / "model.safetensors", a_model_that_asks(config), config)
    config = config.with_values(site={"images": directory / "images", "model": directory / "model.safetensors"})
    processes = [
        SPAWN.Process(target=party, args=(name, placed.model_dump(mode="json"), str(directory)), name=name)
        for name, placed in place_parties(config, directory).items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    told = directory / f"{HOSPITAL}.told"
    frames = torch.load(directory / "frames.pt", weights_only=True)
    codes = {process.name: process.exitcode for process in processes}
    return frames, codes, told.read_text() if told.exists() else ""


def outline(frames: list[Any]) -> list[Any]:
    """All of a transcript but greetings and the values of tensors."""
    return [
        (kind, tag, (payload.dtype, tuple(payload.shape)) if isinstance(payload, torch.Tensor) else payload)
        for _, kind, tag, payload in frames
        if kind not in ("HELLO", "WELCOME")
    ]


def assert_uniform(parts: list[np.ndarray], what: str) -> None:
    counts = np.bincount(np.concatenate([part.reshape(-1).view(np.uint8) for part in parts]), minlength=256)
    assert counts.sum() > 2000 and stats.chisquare(counts).pvalue > FALSE_ALARM, what


@pytest.mark.processes
def test_logits_beyond_the_bound_are_told_to_nobody(tmp_path: Path) -> None:
    dark = run_programs(tmp_path / "dark", [0, 0])
    bright = run_programs(tmp_path / "bright", [255, 0])
    assert outline(dark[0]) == outline(bright[0])
    assert outline(dark[0])[-1][0] == "BYE" and len(outline(dark[0])) > 20
    for frames, _, _ in (dark, bright):
        words = [payload.numpy() for _, kind, _, payload in frames if kind == "TENSOR"]
        assert_uniform([each for each in words if each.view(np.uint64).max() > 1], "masked words")
        single = np.concatenate([each.reshape(-1) for each in words if each.view(np.uint64).max() <= 1])
        assert stats.binomtest(int(single.sum()), len(single)).pvalue > FALSE_ALARM
    # The hospital alone learns it, from its own program, when all is over.
    assert dark[1] == dict.fromkeys(NAMES, 0) and dark[2] == ""
    assert bright[1] == {HOSPITAL: 9, MODEL_OWNER: 0, DEALER: 0}
    assert "image 1 of 2 got no result: a logit lies beyond inference.logit_bound=4096" in bright[2]
    assert "\n" not in bright[2] and "8192" not in bright[2]
    for name, images in (("dark", [0, 1]), ("bright", [1])):
        written = (tmp_path / name / "parties" / HOSPITAL / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in written] == images


# ---- engine fast -------------------------------------------------------------------------------------------------------


def configuration(normalise: str = "none", reveal: str = "logits") -> Config:
    data = {"source": "images", "image_size": SIZE, "channels": 1, "normalise": normalise}
    model = {"architecture": "small_cnn"}
    return Config().with_values(task="infer", data=data, model=model, inference={"engine": "fast", "reveal": reveal})


def linear_network(scale: float) -> Network:
    """The shortest network: one linear layer on an image whose scale the owner chooses."""
    pixels = SIZE * SIZE
    values = {
        "image": Value((1, SIZE, SIZE), 32, scale),
        "flat": Value((pixels,), 32, scale),
        "logits": Value((CLASSES,), 20, 2.0**-10),
    }
    layers = (
        Flatten("flat", ("image",), "flat"),
        Linear("fc", ("flat",), "logits", 12, (CLASSES, pixels)),
    )
    return Network(layers, values, "image", "logits")


def model_of(network: Network) -> IntegerModel:
    weights = {layer.output: torch.ones(layer.weight_shape, dtype=torch.int32) for layer in network.linear_layers}
    biases = {layer.output: torch.zeros(layer.weight_shape[0], dtype=torch.int32) for layer in network.linear_layers}
    return IntegerModel(network, Private("integer weights", IntegerWeights(weights, biases)))


class Transcript:
    """What the hospital sent the owner, to its last word."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, str, str, Any]] = []

    def watch(self, network: InMemoryNetwork) -> None:
        network.watch(self._keep)

    def _keep(self, sender: str, receiver: str, frame: Frame) -> None:
        if (sender, receiver) == (HOSPITAL, MODEL_OWNER):
            payload = frame.payload.clone() if isinstance(frame.payload, torch.Tensor) else frame.payload
            self.frames.append((sender, frame.kind.name, frame.tag, payload))


def transcript_of(attack: Callable[[Links, Config, Path], None], records: torch.Tensor, directory: Path,
                  config: Config) -> tuple[list[Any], str]:  # fmt: skip
    """Frames that the owner got from a hospital that asks about `records`, and with what line the hospital ended."""
    seen, told = Transcript(), []

    def program(links: Links) -> None:
        if links.name == DEALER:
            deal(links, HOSPITAL, MODEL_OWNER)
        elif links.name == MODEL_OWNER:
            attack(links, config, directory)
        else:
            count = len(records)
            names = tuple(map(str, range(count)))
            dataset = Dataset(records, torch.zeros(count, dtype=torch.int64), torch.arange(count), names)
            record = OpeningRecord(directory / "hospital.jsonl", HOSPITAL)
            try:
                request_diagnoses(config, dataset, links, record, nothing)
            except MpcFlError as error:
                told.append(str(error))
                raise

    try:
        run_parties_in_memory(program, NAMES, prepare=seen.watch)
    except AssertionError:
        assert told, "only the hospital may have a reason to end"
    return seen.frames, "".join(told)


def owner_of(scale: float, constants: Normalisation | None = None) -> Callable[[Links, Config, Path], None]:
    """An owner that keeps to the protocol but for the public constants."""

    def attack(links: Links, config: Config, directory: Path) -> None:
        if constants is not None:
            links.send_tensor(HOSPITAL, "normalisation", constants.tensor())
        domain = SecretDomain(links, [HOSPITAL, MODEL_OWNER], OpeningRecord(directory / "owner.jsonl", MODEL_OWNER))
        with contextlib.suppress(MpcFlError):  # it wants to know how the hospital ends, and that is in the frames
            OwnerSession(domain, HOSPITAL, model_of(linear_network(scale))).serve()
        await_the_end(links)

    return attack


def pictures(largest: float) -> torch.Tensor:
    """Two images, dark but for one pixel."""
    records = torch.zeros(2, 1, SIZE, SIZE)
    records[0, 0, 3, 5] = largest
    return records


@pytest.mark.parametrize(
    ("scale", "constants", "line"),
    [
        # Pixels below 3/4 fit the ring at this scale.
        (0.75 * 2.0**-31, None, "the model owner's network has no room for inputs up to 1"),
        (2.0**-12, Normalisation((0.0,), (2.0**-20,)), "the model owner normalises inputs so that they could exceed"),
        (2.0**-28, Normalisation((0.0,), (1 / 16,)), "the model owner's network has no room for inputs up to 16"),
    ],
)
def test_public_constants_ask_nothing_about_pixels(
    scale: float, constants: Normalisation | None, line: str, tmp_path: Path
) -> None:
    """Chosen so that bright pixels do not fit 32 bits: the hospital refuses them before it looks at a pixel."""
    config = configuration("none" if constants is None else "secure")
    found = [transcript_of(owner_of(scale, constants), pictures(largest), tmp_path, config) for largest in (0.125, 1.0)]
    (dark, dark_line), (bright, bright_line) = found
    assert outline(dark) == outline(bright) and dark_line == bright_line
    assert line in dark_line and "nothing was sent of any image" in dark_line
    assert not [kind for _, kind, _, _ in dark if kind == Kind.TENSOR.name]


def test_constants_that_leave_room_are_used(tmp_path: Path) -> None:
    """The finest scale that is accepted: the brightest image fits, and its session ends like that of a black one."""
    found = [transcript_of(owner_of(2.0**-30), pictures(largest), tmp_path, configuration()) for largest in (0.0, 1.0)]
    (dark, dark_line), (bright, bright_line) = found
    assert outline(dark) == outline(bright) and dark_line == bright_line == ""
    assert outline(dark)[-1] == ("BYE", "", {})


@pytest.mark.parametrize(
    ("reveal", "first"),
    [("logits", "relu"), ("label", "relu"), ("logits", "relu with a ceiling"), ("logits", "sign extension")],
)
def test_whatever_the_owner_answers_the_hospital_goes_on_alike(reveal: str, first: str, tmp_path: Path) -> None:
    """The owner sends noise in place of its part of every opening, and of the result."""

    def noise(links: Links, config: Config, directory: Path) -> None:
        send = links.send_tensor

        def send_noise(receiver: str, tag: str, tensor: torch.Tensor) -> None:
            if tag.startswith(("masked ", "opening")) and not tag.startswith(WEIGHTS):
                low, high = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
                tensor = torch.randint(low, high, tensor.shape, dtype=tensor.dtype)
            send(receiver, tag, tensor)

        links.send_tensor = send_noise  # type: ignore[method-assign]
        terms = SessionTerms(reveal)  # type: ignore[arg-type]
        domain = SecretDomain(links, [HOSPITAL, MODEL_OWNER], OpeningRecord(directory / "owner.jsonl", MODEL_OWNER))
        OwnerSession(domain, HOSPITAL, model_of(gated_network(SIZE, first)), terms).serve()
        await_the_end(links)

    config = configuration(reveal=reveal)
    found = [transcript_of(noise, torch.full((8, 1, SIZE, SIZE), grey), tmp_path, config) for grey in (0.0, 1.0)]
    assert outline(found[0][0]) == outline(found[1][0])
    for frames, line in found:
        assert line == "" and outline(frames)[-1] == ("BYE", "", {})
        for prefix in ("E ", "masked "):
            parts = [payload.numpy() for _, kind, tag, payload in frames if kind == "TENSOR" and tag.startswith(prefix)]
            # A last byte that is not full is filled with zeros, in every session alike: it counts in short messages.
            assert_uniform([part for part in parts if part.nbytes > 64], prefix)


# ---- two networks ------------------------------------------------------------------------------------------------------


def gated_network(size: int, first: str = "relu") -> Network:
    """The image, truncated to 20 bits, enters a comparison at once: the hospital's share of it is the image itself.

    The value that the gate makes is read by a linear layer as it is, so a sign extension's E follows what it opened.
    """
    unit = 2.0**-12
    values = {
        "image": Value((1, size, size), 32, unit / 4096),
        "narrow": Value((1, size, size), 20, unit),
        "relu": Value((1, size, size), 32, unit),
        "point": Value((1, size, size), 32, unit),
        "flat": Value((size * size,), 32, unit),
        "logits": Value((CLASSES,), 20, unit),
    }
    gates: dict[str, Layer] = {
        "relu": ReLU("relu", ("narrow",), "relu"),
        "relu with a ceiling": ReLU("relu", ("narrow",), "relu", ceiling=3 << 9),
        "sign extension": SignExtension("relu", ("narrow",), "relu"),
    }
    layers = (
        Add("narrow", ("image",), "narrow", 12, (1,)),
        gates[first],
        Convolution("point", ("relu",), "point", 0, (1, 1, 1, 1)),
        Flatten("flat", ("point",), "flat"),
        Linear("fc", ("flat",), "logits", 12, (CLASSES, size * size)),
    )
    return Network(layers, values, "image", "logits")


def network_of_padding(margin: int) -> Network:
    """Its layer `relu` is a convolution that reads zeros but for one place: W * A is 0, and its correction -u_C."""
    side = 2 * margin + 1
    values = {"image": Value((1, 1, 1), 32, 1.0), "relu": Value((1, side, side), 32, 1.0)}
    layers = (Convolution("relu", ("image",), "relu", 0, (1, 1, 1, 1), (1, 1), (margin, margin)),)
    return Network(layers, values, "image", "relu")


@pytest.mark.parametrize("grey", [0.25, 1.0])
def test_hospital_and_dealer_told_different_networks_use_different_masks(grey: float) -> None:
    """The dealer is told a network under whose names it would send the masks of the hospital's comparison in the clear."""
    size, margin = 32, 24
    told, other, read = gated_network(size), network_of_padding(margin), []

    def attack(links: Links) -> None:
        links.send_object(HOSPITAL, NETWORK, describe(told))
        links.send_object(DEALER, NETWORK, describe(other))
        for layer in told.linear_layers:
            weights = torch.zeros(layer.weight_shape, dtype=torch.int32)
            links.send_tensor(HOSPITAL, f"{WEIGHTS} {layer.output}", weights)
        message = links.receive_object(HOSPITAL, STEP)
        links.send_object(DEALER, BATCH, {key: message[key] for key in ("number", "records", "reveal")})
        piece = correlation_plan(other, 1, "logits").pieces["relu"]
        correction = links.receive_tensor(DEALER, correction_tag(0), torch.uint8, (piece.correction_bytes,))
        links.send_object(HOSPITAL, READY, {"number": 0})
        links.receive_object(HOSPITAL, STEP)
        masked = links.receive_tensor(HOSPITAL, "masked 0", torch.uint8, None)
        masks = np.negative(correction.numpy().view(np.uint32))[: size * size]
        read.append((unpack(masked.numpy(), 20, size * size) - masks) & np.uint32((1 << 20) - 1))

    def program(links: Links) -> None:
        if links.name == DEALER:
            deal(links, HOSPITAL, MODEL_OWNER)
        elif links.name == MODEL_OWNER:
            attack(links)
        else:
            domain = SecretDomain(links, [HOSPITAL, MODEL_OWNER], OpeningRecord(Path("/dev/null"), HOSPITAL))
            hospital = HospitalSession(domain)
            hospital.prepare(1)
            hospital.diagnose(torch.full((1, 1, size, size), grey))

    with pytest.raises(AssertionError, match="lost model-owner"):
        run_parties_in_memory(program, NAMES)
    assert stats.kstest(read[0] / 2.0**20, "uniform").pvalue > FALSE_ALARM
