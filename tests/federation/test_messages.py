"""What each party receives, recorded frame by frame while the real role programs run.

No plaintext update, image, weight or count may be among it, and what is received must not depend on the secret. Statistical
tests have fixed thresholds; randomness is fresh; each has a false-alarm rate of 1e-7, about 1e-4 for the whole module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.learning.models.evaluation import evaluation_length
from tests.support.harness import SPAWN

pytestmark = pytest.mark.processes
FALSE_ALARM = 1e-7
BIG = 1000  # elements from which a distribution is tested
PUBLIC_TAGS = {"initial parameters", "initial statistics", "global model"}

TRAINING = {
    "data": {"image_size": 16, "phantoms": {"train_patients": 91, "test_patients": 31}},
    "model": {"architecture": "small_cnn"},
    "training": {"rounds": 1, "local_steps": 2, "batch_size": 16},
    "privacy": {"delta": 1e-3},
}


def _record_party(name: str, values: dict[str, Any], directory: str) -> None:
    """Run the real program of one party; keep every frame it receives and, at hospitals, its own plaintext update."""
    import mpc_fl.federation.local_update as federation
    from mpc_fl.apps.runs.party_process import run_party

    frames: list[tuple[str, str, str, Any]] = []
    train_locally = federation.train_locally
    own: dict[str, Any] = {}

    def observed_training(*arguments: Any, **options: Any) -> Any:
        result = train_locally(*arguments, **options)
        own["update"] = result.update
        return result

    def copied(payload: Any) -> Any:
        return payload.clone() if isinstance(payload, torch.Tensor) else payload  # sums are made in place

    federation.train_locally = observed_training
    run_party(
        name,
        parse_config(values, name),
        lambda *_: None,
        lambda peer, frame: frames.append((peer, frame.kind.name, frame.tag, copied(frame.payload))),
    )
    torch.save({"frames": frames, "own": own}, Path(directory) / f"{name}.pt")


def _run(config: Config, directory: Path) -> dict[str, Any]:
    from mpc_fl.apps.runs.local_parties import place_parties

    placed = place_parties(config, directory)
    processes = [
        SPAWN.Process(target=_record_party, args=(name, c.model_dump(mode="json"), str(directory)), name=name)
        for name, c in placed.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
        assert process.exitcode == 0, process.name
    return {name: torch.load(directory / f"{name}.pt", weights_only=True) for name in party_names(config)}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("training")
    views = _run(parse_config(TRAINING, "test"), directory)
    views["model"] = directory / "parties" / "aggregator" / "model.safetensors"
    return views


def _uniform(values: np.ndarray) -> float:
    """Smallest p-value over four bytes of 64-bit words, or of the bit if the words are single bits."""
    words = values.reshape(-1).view(np.uint64)
    if words.max() <= 1:
        return float(stats.binomtest(int(words.sum()), len(words)).pvalue)
    pvalues = []
    for shift in (0, 24, 40, 56):
        digits = ((words >> np.uint64(shift)) & np.uint64(255)).astype(np.int64)
        pvalues.append(stats.chisquare(np.bincount(digits, minlength=256)).pvalue)
    return float(min(pvalues))


def _tensors(view: dict[str, Any]) -> list[tuple[str, str, np.ndarray]]:
    return [(peer, tag, p.numpy()) for peer, kind, tag, p in view["frames"] if kind == "TENSOR"]


def test_hospitals_receive_nothing_but_the_global_model(training: dict[str, Any]) -> None:
    for rank in range(3):
        frames = training[f"hospital-{rank}"]["frames"]
        tensors = [(peer, tag) for peer, kind, tag, _ in frames if kind == "TENSOR"]
        assert tensors == [("aggregator", "parameters"), ("aggregator", "statistics"),
                           ("aggregator", "global model")]  # fmt: skip
        assert {kind for _, kind, _, _ in frames} <= {"HELLO", "WELCOME", "TENSOR", "OBJECT", "BYE"}


def test_the_aggregator_receives_uniform_shares_and_their_sum_is_the_mean(training: dict[str, Any]) -> None:
    received = _tensors(training["aggregator"])
    kinds = {tag.split()[0] for _, tag, _ in received}
    assert kinds == {"summand"}  # nobody may be left out, so there are no keys
    assert all(values.size == 0 for _, tag, values in received if tag.startswith("keys")), "nobody may be left out here"
    for rank in range(3):
        own = training[f"hospital-{rank}"]["own"]["update"].double().numpy()
        shares = [v for peer, tag, v in received if peer == f"hospital-{rank}" and tag.startswith("summand")]
        evaluation = evaluation_length(3)
        assert [len(share) for share in shares] == [evaluation, len(own), evaluation], "nobody's patients are counted"
        weighted = shares[1]
        assert _uniform(weighted[: len(weighted) // 2 * 2].view(np.int64)) > FALSE_ALARM
        # Neither the update nor its sign nor the count shows: correlation within chance, no element in the clear.
        assert abs(np.corrcoef(weighted.astype(np.float64), own)[0, 1]) < 5.4 / np.sqrt(len(own))
        signs = int(((weighted > 0) == (own > 0))[own != 0].sum())
        assert stats.binomtest(signs, int((own != 0).sum())).pvalue > FALSE_ALARM
        counts = {31, 30}
        for count in (4, 1, *counts):  # as itself, over the total weight 4, or times the count
            encoded = np.rint(own * 2**24 * count / 4).astype(np.int64)
            # An element of Z_2^32 meets another by chance once in 2^32: fewer than 3 hits, false-alarm rate below 1e-9.
            assert int((weighted == encoded)[encoded != 0].sum()) < 3


def test_shares_of_different_updates_look_alike(training: dict[str, Any]) -> None:
    shares = [v for _, tag, v in _tensors(training["aggregator"]) if tag.startswith("summand") and len(v) > BIG]
    assert len(shares) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert stats.ks_2samp(shares[one], shares[other]).pvalue > FALSE_ALARM


def test_control_messages_hold_no_numbers_of_patients(training: dict[str, Any]) -> None:
    for name in party_names(parse_config(TRAINING, "test")):
        for _, kind, tag, payload in training[name]["frames"]:
            if kind in ("HELLO", "WELCOME"):
                assert set(payload) == {"name", "to", "version", "session", "digest", "task", "public_key", "answers",
                                        "certificate", "signature"}  # fmt: skip
            elif tag.rpartition("/")[2].startswith("ledger"):
                # Certificates, and signatures of what all parties know alike.
                assert set(payload) <= {"claim", "signature", "signatures", "certificate", "certificates", "resumed",
                                        "blocks", "seal",
                                        *party_names(parse_config(TRAINING, "test"))}, (tag, set(payload))  # fmt: skip
            elif tag == "word":
                # Who takes part, and the power of two above the number of hospitals: that of patients is nowhere.
                assert set(payload) <= {"word", "number", "attempt", "hospitals", "starts", "newcomers", "weight_total",
                                        "resumed", "normalised", "signatures"}  # fmt: skip
                assert payload.get("weight_total", 1) in (1, 4) and payload.get("number", 0) in (0, 1, 2)
            elif tag == "present":
                assert set(payload) == {"held"} and all(len(key) == 64 for key in payload["held"].values())
            elif tag.startswith("ready"):
                # A signature over what all in the sum were told.
                assert set(payload) == {"confirmation"} and len(payload["confirmation"]) <= 144
            elif kind == "OBJECT":
                assert payload == {"rounds": 1}  # the end of the run, as configured
            elif kind != "TENSOR":
                assert payload == {}, kind


@pytest.fixture(scope="module")
def inference(training: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two images in one session: one black, one all white. The model is the trained one."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("inference")
    (directory / "images").mkdir()
    for name, value in (("a-black.png", 0), ("b-white.png", 255)):
        Image.fromarray(np.full((16, 16), value, dtype=np.uint8)).save(directory / "images" / name)
    values = {**TRAINING, "task": "infer", "data": {"source": "images", "image_size": 16, "channels": 1},
              "site": {"images": str(directory / "images"), "model": str(training["model"])}}  # fmt: skip
    views = _run(parse_config(values, "test"), directory)
    views["results"] = (directory / "parties" / "hospital-0" / "results.jsonl").read_text()
    return views


def _by_image(view: dict[str, Any], sender: str) -> list[list[np.ndarray]]:
    """The tensors of the two images apart: both runs send the same shapes in the same order."""
    tensors = [values for peer, _, values in _tensors(view) if peer == sender]
    half = len(tensors) // 2
    assert [t.shape for t in tensors[:half]] == [t.shape for t in tensors[half:]]
    return [tensors[:half], tensors[half:]]


@pytest.mark.parametrize(("party", "sender"), [("model-owner", "hospital-0"), ("hospital-0", "model-owner")])
def test_everything_received_in_inference_is_uniform_whatever_the_image(
    inference: dict[str, Any], party: str, sender: str
) -> None:
    black, white = _by_image(inference[party], sender)
    tested = 0
    for one, other in zip(black, white, strict=True):
        assert one.dtype == np.int64
        if one.size < BIG:
            continue
        tested += 1
        assert _uniform(one) > FALSE_ALARM and _uniform(other) > FALSE_ALARM
        assert stats.ks_2samp(one.reshape(-1), other.reshape(-1)).pvalue > FALSE_ALARM
    assert tested > 20


def test_only_the_hospital_gets_the_logits(inference: dict[str, Any]) -> None:
    assert [tag for _, tag, _ in _tensors(inference["hospital-0"])].count("opening") == 2
    assert "opening" not in [tag for _, tag, _ in _tensors(inference["model-owner"])]
    assert inference["results"].count("\n") == 2


def test_the_dealer_receives_shapes_only(inference: dict[str, Any]) -> None:
    frames = inference["dealer"]["frames"]
    assert not [kind for _, kind, _, _ in frames if kind == "TENSOR"]
    control = [p for peer, kind, tag, p in frames if kind == "OBJECT" and tag == "dealer control"]
    requests = [request for message in control for request in message.get("requests", [])]
    assert len(requests) > 100
    for request in requests:
        assert set(request) <= {"kind", "shapes", "operation", "options"}
        assert all(isinstance(size, int) and size < 10**6 for shape in request["shapes"] for size in shape)
    for message in control:
        assert set(message) <= {"kind", "program", "requests", "more", "ahead_bytes", "instance", "following"}
    assert {tag for _, kind, tag, _ in frames if kind == "OBJECT"} == {"dealer control", "dealer consumed"}
    for _, kind, tag, message in frames:
        if kind == "OBJECT" and tag == "dealer consumed":
            assert set(message) == {"instance", "blocks", "complete"}


def test_both_images_ask_the_dealer_for_the_same(inference: dict[str, Any]) -> None:
    """One declaration serves both; apart from the running number the dealer cannot tell one image from the other."""
    frames = inference["dealer"]["frames"]
    for party in ("hospital-0", "model-owner"):
        control = [p for peer, kind, tag, p in frames if (peer, kind, tag) == (party, "OBJECT", "dealer control")]
        assert [message["kind"] for message in control] == ["declare", "prepare", "run", "run", "finish"]
        runs = [(message["program"], message["instance"]) for message in control if message["kind"] == "run"]
        assert runs == [("batch of 1", 1), ("batch of 1", 2)]
