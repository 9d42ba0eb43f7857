"""`check` and `estimate`: what they say before a run is what the run then does."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mpc_fl.apps.cli import main as cli
from mpc_fl.apps.estimates import InferenceEstimate, TrainingEstimate
from mpc_fl.apps.runs import estimate
from mpc_fl.apps.runs.estimate import estimate_inference, estimate_training
from mpc_fl.apps.runs.local_runs import infer, train
from mpc_fl.config.config import Config, parse_config

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
SMALL = {
    "data": {"source": "images", "image_size": 8, "patient_pattern": r"(\w+)\.png", "most_unreadable": 0.6},
    "training": {"rounds": 3, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"delta": 0.01, "smallest_hospital": 9},
    "federation": {"hospitals": 2},
    "inference": {"batch_size": 2},
}
SIGNED = 4000  # a message of the reveal ledger: signatures of all parties, or their certificates
HEADER, GREETING = 150, 2000  # at most: bytes of a frame beyond its tensor, of a greeting with certificates


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, complained = capsys.readouterr()
    assert (ended.value.code, complained) == (0, "")
    return said


def test_check_and_estimate_for_machines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checked = json.loads(command(capsys, monkeypatch, "check", DEMO, "--json"))
    estimated = json.loads(command(capsys, monkeypatch, "estimate", DEMO, "--json"))
    assert checked.pop("device").startswith("cpu") and str(checked.pop("kernels"))
    data = checked.pop("data")
    assert (data["patients"], data["training_patients"], data["unit"]) == (3000, [800, 800, 800], "patient")
    assert checked.pop("packages") == {} and checked.pop("ledgers") == []
    assert checked == {"ok": True, **estimated["training"], "shared_patients": []}
    training, inference = estimated["training"], estimated["inference"]
    assert training["parameters"] == 22_499 and training["headroom_bits_spare"] > 0
    assert [line["patients"] for line in training["privacy"]] == [800, 800, 800]
    for line in training["privacy"]:
        assert 7.9 < line["epsilon_with_spare"] <= line["target_epsilon"] == 8.0 and line["noise_multiplier"] > 1
        assert 7 < line["epsilon"] < 7.9  # without a round that is lost and made anew
    for key in ("bytes_sent_per_hospital", "bytes_sent_by_aggregator", "messages_per_hospital"):
        assert training[key] > 0
    for key in ("bytes_per_party", "bytes_sent_by_dealer", "rounds", "comparisons", "multiplications"):
        assert inference[key] > 0
    assert 0 < training["connecting_seconds"] < training["connecting_deadline"] == 60.1
    assert 4e8 < training["memory_bytes_per_hospital"] < 2e9 and 4e8 < inference["memory_bytes_per_party"] < 2e9


def test_check_and_estimate_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = command(capsys, monkeypatch, "check", DEMO)
    assert re.search(
        r"^hospital-2: 800 training patients, epsilon 7\.\d\d with noise multiplier 2\.\d+$", said, re.MULTILINE
    )
    assert re.search(r"^Headroom: 1\.0 bits to spare\.\nMemory: about [4-9]\d\d MB per hospital\. The run can work\.$", said,
                     re.MULTILINE)  # fmt: skip
    said = command(capsys, monkeypatch, "estimate", DEMO, "--set", "privacy.mechanism=none")
    assert re.search(r"each hospital sends [67]\d\d kB in 36 messages, needs about [4-9]\d\d MB of memory", said)
    assert re.search(r"connecting takes about [\d.]+ m?s with all on this machine; the run waits 60.1 s at most", said)
    assert said.count("800 patients, no differential privacy") == 3
    assert re.search(r"3\.\d+ MB sent per party in 57 rounds", said) and re.search(
        r"1\.\d+ MB sent by the dealer", said
    )
    said = command(capsys, monkeypatch, "estimate", DEMO.with_name("breast_cancer.yaml"))
    assert re.search(r"each hospital sends [\d.]+ kB in", said) and not re.search(r"\b0\.0 |\b0 bytes", said)


def test_check_refuses_what_memory_cannot_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 1 << 29)
    monkeypatch.setattr(sys, "argv", ["mpc-fl", "check", str(DEMO), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, complained = capsys.readouterr()
    assert ended.value.code == 1 and json.loads(said)["ok"] is False
    assert re.fullmatch(
        r"mpc-fl: 4 parties need about [\d.]+ GB of memory together, 537 MB are available: use fewer .*\n", complained
    )


def test_parties_that_share_their_imports_need_them_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 16 << 30)
    monkeypatch.setattr(estimate, "modules_to_share", lambda config: ("torch",))
    many = ["--set", "federation.hospitals=64", "--set", "privacy.mechanism=none"]
    assert "The run can work." in command(capsys, monkeypatch, "check", DEMO, *many)
    monkeypatch.setattr(estimate, "modules_to_share", lambda config: ())  # as on other systems than Linux
    monkeypatch.setattr(sys, "argv", ["mpc-fl", "check", str(DEMO), *many])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "65 parties need about 3" in capsys.readouterr().err


def test_a_network_that_does_not_take_the_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--set", "data.channels=3", "--set", "model.architecture=alexnet"]
    monkeypatch.setattr(sys, "argv", ["mpc-fl", "check", str(DEMO), *settings])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    assert capsys.readouterr().err == (
        "mpc-fl: the network does not take records of shape 3x32x32: set data.image_size to what it takes\n"
    )


def test_what_the_trained_layers_read_is_counted_and_a_step_is_that_of_the_trained_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def memory(patients: int, trainable: str) -> int:
        values = {
            "data": {"image_size": 64},
            "model": {"architecture": "small_cnn"},
            "training": {"trainable": trainable, "batch_size": 200},
            "privacy": {"mechanism": "none"},
        }
        return estimate_training(parse_config(values, "test"), [patients] * 3).memory_bytes_per_hospital

    def of_a_patient(trainable: str) -> float:
        return (memory(2_000, trainable) - memory(1_000, trainable)) / 1_000

    image, kept = 2 * 4 * 64 * 64, 4 * 32 * 16 * 16
    assert of_a_patient("all") == image
    assert of_a_patient("last:3") == image + kept
    assert memory(200, "last:3") < memory(200, "all") - 100_000_000
    monkeypatch.setattr(estimate, "LARGEST_BYTES", 999 * kept)  # then steps take the whole network
    assert of_a_patient("last:3") == image and memory(200, "last:3") < memory(200, "all")


def test_more_of_anything_costs_more() -> None:
    def both(**changes: dict[str, Any]) -> tuple[TrainingEstimate, InferenceEstimate]:
        values = {name: {**SMALL.get(name, {}), **changes.get(name, {})} for name in {*SMALL, *changes}}
        config = parse_config(values, "test")
        return estimate_training(config, [12] * config.federation.hospitals), estimate_inference(config)

    small, inference = both()
    rounds, _ = both(training={"rounds": 6})
    hospitals, _ = both(federation={"hospitals": 4})
    _, images = both(inference={"batch_size": 4})
    large, large_inference = both(data={"image_size": 64})
    assert rounds.bytes_sent_per_hospital > 1.8 * small.bytes_sent_per_hospital
    assert rounds.privacy[0].noise_multiplier > small.privacy[0].noise_multiplier
    assert hospitals.bytes_sent_per_hospital == small.bytes_sent_per_hospital
    assert hospitals.bytes_sent_by_aggregator == 2 * small.bytes_sent_by_aggregator
    assert images.bytes_sent_by_dealer == 2 * inference.bytes_sent_by_dealer
    assert large.memory_bytes_per_hospital > small.memory_bytes_per_hospital
    assert large_inference.memory_bytes_per_party > inference.memory_bytes_per_party


# ---- against real runs -------------------------------------------------------------------------------------------------


def traffic(run: Path, party: str) -> dict[str, Any]:
    return json.loads((run / "parties" / party / "traffic.json").read_text())["phases"]


def sent(run: Path, party: str, what: str) -> int:
    return sum(count[what] for phase in traffic(run, party).values() for count in phase["peers"].values())


def peak_memory(run: Path, party: str) -> int:
    log = (run / "logs" / f"{party}.log").read_text()
    return 10**6 * int(re.search(r"its peak memory was (\d+) MB", log).group(1))  # type: ignore[union-attr]


def assert_sent(run: Path, party: str, expected: int) -> None:
    """Not less than estimated, and more only by the headers of frames and what all sign."""
    signed = sum(count["messages_sent"] for phase, counts in traffic(run, party).items()
                 if "signatures" in phase or phase == "reveal ledger" for count in counts["peers"].values())  # fmt: skip
    headers = HEADER * sent(run, party, "messages_sent") + 2 * GREETING + SIGNED * signed
    assert expected <= sent(run, party, "bytes_sent") <= expected * 1.001 + headers, party


def make_images(directory: Path) -> None:
    """24 training patients and a few more; one file of a test class and one to diagnose cannot be read."""
    draw = np.random.default_rng(0)
    for folder, count in (("train", 8), ("test", 4)):
        for name in ("normal", "bacterial", "viral"):
            (directory / folder / name).mkdir(parents=True)
            for patient in range(count):
                pixels = Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8))
                pixels.save(directory / folder / name / f"{name}{folder}{patient}.png")
    (directory / "test" / "viral" / "viraltest3.png").write_bytes(b"no image")
    shutil.copytree(directory / "test" / "viral", directory / "ward", ignore=shutil.ignore_patterns("viraltest0.png"))


class Runs(NamedTuple):
    """A training and a diagnosis with it, and their progress: done and total of each phase at each party, in order."""

    config: Config
    train: Path
    infer: Path
    train_progress: dict[tuple[str, str], list[tuple[int, int]]]
    infer_progress: dict[tuple[str, str], list[tuple[int, int]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("estimate")
    result = Runs(parse_config(SMALL, "test"), directory / "train", directory / "infer", {}, {})

    def train_progress(party: str, phase: str, done: int, total: int) -> None:
        result.train_progress.setdefault((party, phase), []).append((done, total))

    def infer_progress(party: str, phase: str, done: int, total: int) -> None:
        result.infer_progress.setdefault((party, phase), []).append((done, total))

    images = directory / "images"
    make_images(images)
    train(result.config.with_values(site={"data": str(images)}), result.train, "test", train_progress)
    site = {"model": str(result.train / "model.safetensors"), "images": str(images / "ward")}
    infer(result.config.with_values(site=site), result.infer, "test", infer_progress)
    return result


@pytest.mark.processes
def test_progress_of_every_phase_rises_to_its_end(runs: Runs) -> None:
    rounds = ["training", "aggregation", "evaluation"]
    wanted = {(f"hospital-{rank}", phase) for rank in (0, 1) for phase in ["load data", "connect", *rounds]}
    wanted |= {("aggregator", phase) for phase in ["connect", *rounds[1:]]}
    assert set(runs.train_progress) == wanted
    wanted = {("hospital-0", "load data"), ("hospital-0", "encrypted inference"), ("model-owner", "load model")}
    assert set(runs.infer_progress) == wanted | {
        (party, "connect") for party in ("hospital-0", "model-owner", "dealer")
    }
    for key, steps in (*runs.train_progress.items(), *runs.infer_progress.items()):
        done, totals = [step[0] for step in steps], {step[1] for step in steps}
        assert done == sorted(done) and totals == {done[-1]}, key
    assert len(runs.train_progress["hospital-1", "training"]) == 3  # each step of each round


@pytest.mark.processes
def test_unreadable_files_are_counted_and_named(runs: Runs) -> None:
    for run in (runs.train, runs.infer):
        assert json.loads((run / "summary.json").read_text())["skipped_files"] == 1
        logs = "".join(path.read_text() for path in (run / "logs").glob("hospital-*.log"))
        assert logs.count("skipped: cannot read image") == 1 and "viraltest3.png: no valid PNG file" in logs


@pytest.mark.processes
def test_training_costs_what_was_estimated(runs: Runs) -> None:
    config, run = runs.config, runs.train
    expected = estimate_training(config, [12, 12])
    for name in ("hospital-0", "hospital-1"):
        assert_sent(run, name, expected.bytes_sent_per_hospital)
        # Besides, a greeting to both peers, and a farewell unless the peer was faster.
        assert 2 <= sent(run, name, "messages_sent") - expected.messages_per_hospital <= 4
        assert 0.5 < peak_memory(run, name) / expected.memory_bytes_per_hospital < 2
    assert_sent(run, "aggregator", expected.bytes_sent_by_aggregator)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == expected.parameters
    for told, done in zip(expected.privacy, summary["privacy"], strict=True):
        assert told.epsilon == pytest.approx(done["epsilon"], rel=1e-9)
        assert told.noise_multiplier == pytest.approx(done["noise_multiplier"], rel=1e-9)


@pytest.mark.processes
def test_inference_with_the_engine_fast_costs_what_was_estimated(runs: Runs, tmp_path: Path) -> None:
    """Bytes follow from the network but for the widths of its values, which the trained model's ranges decide."""
    config = runs.config.with_values(inference={"engine": "fast"})
    expected = estimate_inference(config)
    assert expected.comparisons > 0 and expected.multiplications > 0
    site = {"model": str(runs.train / "model.safetensors"), "images": str(runs.train.parent / "images" / "ward")}
    run = tmp_path / "fast"
    infer(config.with_values(site=site), run, "test", lambda *_: None)
    online = {
        name: json.loads((run / "parties" / name / "traffic.json").read_text())["phases"]["online"]["peers"][other][
            "bytes_sent"
        ]
        for name, other in (("hospital-0", "model-owner"), ("model-owner", "hospital-0"))
    }
    assert online["hospital-0"] == pytest.approx(expected.bytes_from_hospital, rel=0.2, abs=60 * HEADER)
    assert online["model-owner"] == pytest.approx(expected.bytes_from_model_owner, rel=0.2, abs=60 * HEADER)
    for name in ("hospital-0", "model-owner", "dealer"):
        assert 0.5 < peak_memory(run, name) / expected.memory_bytes_per_party < 2


@pytest.mark.processes
def test_inference_costs_what_was_estimated(runs: Runs) -> None:
    config, run = runs.config, runs.infer
    expected = estimate_inference(config)
    logits = 8 * config.inference.batch_size * len(config.data.classes)  # the model owner's shares of the result
    assert_sent(run, "hospital-0", expected.bytes_per_party)
    assert_sent(run, "model-owner", expected.bytes_per_party + logits)
    assert_sent(run, "dealer", expected.bytes_sent_by_dealer)
    for name in ("hospital-0", "model-owner", "dealer"):
        assert 0.5 < peak_memory(run, name) / expected.memory_bytes_per_party < 2


def test_many_hospitals_are_told_what_their_masks_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ["--set", "privacy.mechanism=none", "--set", "federation.hospitals=20", "--set", "federation.quorum=19"]
    said = command(capsys, monkeypatch, "estimate", DEMO, *many)
    assert "each hospital shares them with 12 others, holds 22 keys of a sum" in said
    assert "hidden from the aggregator with any 4 hospitals of the sum that pool before it" in said
    monkeypatch.setattr(estimate, "available_memory", lambda: 64 << 30)
    checked = command(capsys, monkeypatch, "check", DEMO, *many)
    assert "Masks: with 12 others each, against the aggregator and 4 hospitals." in checked


@pytest.mark.parametrize(
    ("changes", "neighbours", "against"),
    [
        ({}, 38, 12),
        ({"aggregation": {"mask_neighbours": "all"}}, 63, 56),
        ({"aggregation": {"norm_check": True, "norm_bound": 10.0}}, 63, 56),
        ({"privacy": {"mechanism": "none", "colluders": 30}}, 63, 56),
    ],
)
def test_masks_of_many_hospitals(changes: dict[str, Any], neighbours: int, against: int) -> None:
    values = {"privacy": {"mechanism": "none"}, "federation": {"hospitals": 64, "quorum": 58}, **changes}
    found = estimate.estimate_training(parse_config(values, "test"), [10] * 64)
    assert (found.mask_neighbours, found.masks_against) == (neighbours, against)
    assert 0 < found.masking_seconds < found.opening_seconds
