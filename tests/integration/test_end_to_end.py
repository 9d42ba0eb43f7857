"""The user's two commands, with real processes: train, then diagnose under encryption."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpc_fl.audit.model_origin import model_origin

pytestmark = pytest.mark.processes
REPOSITORY = Path(__file__).resolve().parents[2]


def mpc_fl(*arguments: object) -> dict[str, Any]:
    """Run a command with --json; return what it prints, or fail with what it said."""
    command = [sys.executable, "-m", "mpc_fl", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def open_to_others(directory: Path) -> list[Path]:
    """What anybody but the user who ran it may read or enter; certificates are public."""
    paths = [directory, *directory.rglob("*")]
    return [path for path in paths if path.stat().st_mode & 0o077 and path.suffix != ".crt"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The embedded default, exactly as `make demo` trains it."""
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, mpc_fl("train", REPOSITORY / "configs" / "demo.yaml", "--out", out)


def test_the_default_learns_far_above_chance_at_epsilon_8(demo: tuple[Path, dict[str, Any]]) -> None:
    """Ten separate runs reached 80 to 93 %; a lower bound of 60 % against a chance of 33 % leaves room for unlucky noise."""
    _, summary = demo
    final = summary["final"]
    assert final["accuracy_low"] > 0.6
    assert final["accuracy_low"] < final["accuracy"] < final["accuracy_high"] < final["accuracy_low"] + 0.12
    assert final["records"] == sum(map(sum, final["confusion"])) > 600
    for line in summary["privacy"]:
        assert 7.2 < line["epsilon"] < 8.0 and line["mechanism"] == "local"
    assert summary["synthetic"] is True


def test_a_run_leaves_everything_the_readme_promises(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["training"]["rounds"] == summary["rounds"] == 8
    with safe_open(out / "model.safetensors", framework="pt") as model:
        assert json.loads(model.metadata()["mpc-fl"])["classes"] == ["normal", "bacterial", "viral"]
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(9))
    report = (out / "report.html").read_text()
    assert "SYNTHETIC" in report and "http://" not in report.replace("http://www.w3.org", "")
    names = ["aggregator", "hospital-0", "hospital-1", "hospital-2"]
    assert sorted(path.stem for path in (out / "logs").iterdir()) == names
    assert not list(out.rglob("*.key")) and not list(out.rglob("*.partial"))
    assert open_to_others(out) == []


def test_the_model_has_a_card_that_can_be_made_anew_and_refuses_another_model(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, summary = demo
    text = (out / "model_card.md").read_text()
    assert (
        text
        == mpc_fl("model", "card", out)["model_card"]
        == mpc_fl("model", "card", out / "model.safetensors")["model_card"]
    )
    blocks = [json.loads(line) for line in (out / "reveal_ledger.jsonl").read_text().splitlines()]
    assert f"SHA-256 `{blocks[-1]['values']['model.safetensors']}`" in text
    assert "is in the last block of the reveal ledger" in text and "SYNTHETIC" in text
    spent = {line["epsilon"] for line in summary["privacy"]}
    assert {f"{epsilon:.3f}" for epsilon in spent} == set(re.findall(r"this run alone \| ([\d.]+);", text))
    assert f"{summary['final']['records']} test records of all hospitals" in text
    # A model that was exchanged gets no card.
    other = tmp_path / "other"
    shutil.copytree(out, other, ignore=shutil.ignore_patterns("parties", "logs"))
    tensors = load_file(other / "model.safetensors")
    with safe_open(other / "model.safetensors", framework="pt") as model:
        said = model.metadata()
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", said)
    command = [sys.executable, "-m", "mpc_fl", "model", "card", str(other)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert refused.returncode != 0 and "is not the one that all parties signed" in refused.stderr
    assert refused.stdout == "" and len(refused.stderr.splitlines()) == 1


def test_every_file_of_a_run_is_in_the_documentation(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    page = (REPOSITORY / "docs" / "run_directory.md").read_text()
    for path in out.rglob("*"):
        name = re.sub(r"hospital-\d+", "hospital-<n>", re.sub(r"checkpoint-\d+", "checkpoint-<round>", path.name))
        if path.is_file() and path.parent.name != "logs":
            assert f"`{name}`" in page, path
    assert all(f"`{key}`" in page for key in {**summary["final"], "confusion": None})


def test_every_opening_is_recorded_alike_by_all_and_goes_to_the_aggregator(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo

    def record(path: Path) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["number"], line["why"], tuple(line["shape"]), tuple(line["to"])) for line in lines]

    central = record(out / "openings.jsonl")
    assert all(record(out / "parties" / f"hospital-{rank}" / "openings.jsonl") == central for rank in range(3))
    assert len(central) == 2 + summary["rounds"]  # one a round, evaluation before the first and after the last one
    assert {to for *_, to in central} == {("aggregator",)}
    assert (summary["parameters"],) in {shape for _, _, shape, _ in central}


def test_all_parties_hold_the_same_model_in_the_end(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    model = (out / "model.safetensors").read_bytes()
    for rank in range(3):
        assert (out / "parties" / f"hospital-{rank}" / "model.safetensors").read_bytes() == model


def test_diagnosis_under_encryption_agrees_with_plaintext(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = demo
    summary = mpc_fl(
        "infer", REPOSITORY / "configs" / "demo.yaml", "--model", out / "model.safetensors", "--out", tmp_path / "diagnosis",
        "--set", "inference.limit=3", "--set", "inference.batch_size=2", "--set", "inference.plaintext_reference=true",
    )  # fmt: skip
    assert summary["comparison"]["classes_agree"] is True
    assert 0 < summary["comparison"]["largest_logit_difference"] < 0.01
    assert summary["images"] == 3
    for line in summary["results"]:
        assert abs(sum(line["probabilities"]) - 1) < 1e-4
        assert line["predicted"] == max(range(3), key=line["logits"].__getitem__)
    report = (tmp_path / "diagnosis" / "report.html").read_text()
    assert report.count("data:image") >= 3 and "SYNTHETIC" in report
    assert (tmp_path / "diagnosis" / "parties" / "hospital-0" / "images.safetensors").is_file()
    assert open_to_others(tmp_path / "diagnosis") == []


@pytest.mark.slow
def test_tables_of_real_patients(tmp_path: Path) -> None:
    """scikit-learn's breast-cancer set: train, then diagnose rows under encryption."""
    config = REPOSITORY / "configs" / "breast_cancer.yaml"
    summary = mpc_fl("train", config, "--out", tmp_path / "run", "--set", "training.rounds=3")
    assert summary["final"]["accuracy_low"] > 0.7 and summary["synthetic"] is False
    diagnosis = mpc_fl(
        "infer", config, "--model", tmp_path / "run" / "model.safetensors", "--out", tmp_path / "diagnosis",
        "--set", "inference.limit=4", "--set", "inference.batch_size=4", "--set", "inference.plaintext_reference=true",
    )  # fmt: skip
    assert diagnosis["comparison"]["largest_logit_difference"] < 0.01


@pytest.mark.slow
def test_hospitals_of_unequal_size_and_plain_training(tmp_path: Path) -> None:
    """Dirichlet partition and no noise: the weighted mean and the whole path without differential privacy."""
    summary = mpc_fl(
        "train", REPOSITORY / "configs" / "demo.yaml", "--out", tmp_path / "run",
        "--set", "data.partition.method=dirichlet", "--set", "privacy.mechanism=none", "--set", "training.rounds=2",
        "--set", "data.phantoms.train_patients=300", "--set", "data.phantoms.test_patients=120",
        "--set", "training.learning_rate=0.02", "--set", "training.batch_size=32", "--set", "data.image_size=16",
    )  # fmt: skip
    assert all(line["epsilon"] is None for line in summary["privacy"])


@pytest.mark.slow
def test_resnet18_on_real_xrays(xrays: Path, tmp_path: Path) -> None:
    """The paper's network at 224 x 224: one private round, one encrypted diagnosis (the README's command, shortened)."""
    config = REPOSITORY / "configs" / "chest_xray_resnet18.yaml"
    summary = mpc_fl(
        "train", config, "--data", xrays, "--out", tmp_path / "run", "--set", "privacy.delta=1e-3",
        "--set", "training.rounds=1", "--set", "training.local_steps=1", "--set", "training.batch_size=3",
        "--set", "data.subset.test_patients=3",
        "--set", "training.per_sample_gradients=loop",
    )  # fmt: skip
    assert summary["parameters"] == 11_178_051
    diagnosis = mpc_fl(
        "infer", config, "--model", tmp_path / "run" / "model.safetensors", "--images", xrays / "test",
        "--out", tmp_path / "diagnosis", "--set", "inference.limit=1", "--set", "inference.plaintext_reference=true",
    )  # fmt: skip
    assert diagnosis["comparison"]["classes_agree"] is True
    assert diagnosis["comparison"]["largest_logit_difference"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "rounds", "steps"),
    [("none", 6, 1), ("local", 6, 1), ("distributed", 2, 3)],
    ids=lambda value: str(value),
)
def test_a_linear_layer_on_public_features(tmp_path: Path, mechanism: str, rounds: int, steps: int) -> None:
    """Features of the images are the records: at training, at encrypted diagnosis, and in the plaintext it is held against."""
    values: dict[str, Any] = {
        "data": {
            "image_size": 64,
            "phantoms": {"train_patients": 90, "test_patients": 30},
            "features": {"extractor": "scattering"},
            "normalise": "secure",
            "normalise_noise_multiplier": 0.5,
        },
        "model": {"architecture": "linear"},
        "training": {
            "strategy": "fedsgd",
            "rounds": rounds,
            "local_steps": steps,
            "batch_size": 30,
            "learning_rate": 30.0,
        },
        "privacy": {"mechanism": mechanism, "epsilon": 500.0, "delta": 1e-3, "clipping_norm": 0.3},
        "inference": {"engine": "fast", "plaintext_reference": True, "limit": 3},
    }
    values["training"]["average_last"] = 4
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    summary = mpc_fl("train", config, "--out", tmp_path / "run")
    assert summary["parameters"] == 3 * 3473 and summary["final"]["accuracy"] > 0.6
    diagnosis = mpc_fl(
        "infer", config, "--model", tmp_path / "run" / "model.safetensors", "--out", tmp_path / "diagnosis"
    )
    assert diagnosis["images"] == 3 and diagnosis["comparison"]["classes_agree"] is True
    assert diagnosis["comparison"]["largest_logit_difference"] < 0.05


@pytest.mark.slow
def test_a_network_with_adapters_is_trained_signed_and_asked_as_a_plain_one(tmp_path: Path) -> None:
    """Distributed noise for the adapters alone; the encrypted diagnosis and the ledger know a network like any other."""
    values: dict[str, Any] = {
        "data": {"image_size": 16, "phantoms": {"train_patients": 90, "test_patients": 30}},
        "training": {"trainable": "lora:2", "rounds": 1, "local_steps": 2, "batch_size": 20, "learning_rate": 0.05},
        "privacy": {"mechanism": "distributed", "epsilon": 500.0, "delta": 1e-3},
        "inference": {"engine": "fast", "plaintext_reference": True, "limit": 2},
    }
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    mpc_fl("train", config, "--out", run)
    assert model_origin(run / "model.safetensors").signed
    assert len({path.read_bytes() for path in run.rglob("model.safetensors")}) == 1
    diagnosis = mpc_fl("infer", config, "--model", run / "model.safetensors", "--out", tmp_path / "diagnosis")
    assert diagnosis["images"] == 2 and diagnosis["comparison"]["classes_agree"] is True


@pytest.mark.slow
def test_features_of_a_run_stay_sealed_with_each_hospital(tmp_path: Path) -> None:
    """That a second run computes none: `tests/federation/test_feature_cache.py`."""
    values: dict[str, Any] = {
        "data": {
            "image_size": 64,
            "phantoms": {"train_patients": 12, "test_patients": 6},
            "features": {"extractor": "scattering", "mirror": False},
        },
        "model": {"architecture": "linear"},
        "training": {"rounds": 1, "local_steps": 1, "batch_size": 4},
        "privacy": {"mechanism": "none"},
        "site": {"feature_cache": str(tmp_path / "cache")},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    mpc_fl("train", config, "--out", tmp_path / "run")
    logs = [(tmp_path / "run" / "logs" / f"hospital-{rank}.log").read_text() for rank in range(3)]
    found = [re.findall(r"features of (\d+) of (\d+) images are of the cache", log) for log in logs]
    assert all(len(pairs) == 2 for pairs in found), found
    images = sum(int(of) for pairs in found for _, of in pairs)
    assert f"which has {images} records" in mpc_fl("check", config)["features"]
    assert not open_to_others(tmp_path / "cache")


def test_a_network_trained_by_a_recipe_is_an_ordinary_one_for_diagnosis(tmp_path: Path) -> None:
    """Augmented copies, a schedule, an average, weights of classes and standardised convolutions, with distributed noise."""
    values = {
        "data": {"image_size": 16, "phantoms": {"train_patients": 90, "test_patients": 30}},
        "model": {"weight_standardisation": True},
        "training": {
            "rounds": 2,
            "local_steps": 4,
            "batch_size": 20,
            "schedule": "cosine",
            "warm_up": 0.2,
            "ema_decay": 0.7,
            "class_weights": [1.0, 1.5, 1.0],
            "augmentation": {"copies": 2, "flip": True, "rotation": 5, "contrast": 0.1},
        },
        "privacy": {"mechanism": "distributed", "epsilon": 100.0, "delta": 1e-3},
        "inference": {"engine": "fast", "plaintext_reference": True, "limit": 2},
    }
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    mpc_fl("train", config, "--out", out)
    diagnosis = mpc_fl("infer", config, "--model", out / "model.safetensors", "--out", tmp_path / "diagnosis")
    assert diagnosis["images"] == 2 and diagnosis["comparison"]["largest_logit_difference"] < 0.1
