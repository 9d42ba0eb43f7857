"""A whole local run: a directory that appears complete or not at all, its summary and its report.

While a run works its directory is `<out>.partial`. It is renamed to `<out>` when everything is written; after a failure
only configuration and logs are kept, in `<out>.failed`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mpc_fl.config import Config, party_names
from mpc_fl.data import Dataset, load_images
from mpc_fl.diagnosis import private_graph
from mpc_fl.errors import ConfigError, MpcFlError
from mpc_fl.federation import predict
from mpc_fl.files import write_json, write_text
from mpc_fl.identity import ROOT_FILE
from mpc_fl.launcher import Progress, launch
from mpc_fl.ledger_file import OPENINGS_FILE
from mpc_fl.report import write_report
from mpc_fl.reveal_ledger import LEDGER_FILE
from mpc_fl.weights import load_model

_PACKAGES = ("mpc-fl", "torch", "torchvision", "crypten", "opacus", "numpy", "grpcio", "cryptography")


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[Path]:
    """Yield the working directory of a run that shall become `out`.

    Raises `ConfigError` when `out` exists: results are never overwritten.
    """
    try:
        if out.exists() or out.is_symlink():
            raise ConfigError(f"{out} exists already", "choose another --out, or move it away")
        partial, failed = (out.with_name(out.name + suffix) for suffix in (".partial", ".failed"))
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{partial} exists", "another run is using it; remove it if that one is dead") from None
    except OSError as error:
        raise ConfigError(f"cannot create {out}: {error.strerror}", "choose another --out") from None
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        _keep_logs(partial, failed)
        raise


def _keep_logs(partial: Path, failed: Path) -> None:
    """Logs and configuration, and what was revealed until then: each party's reveal ledger, with the certificate."""
    shutil.rmtree(failed, ignore_errors=True)
    logs = partial / "logs"
    if logs.is_dir() and any(logs.iterdir()):
        failed.mkdir(parents=True)
        logs.rename(failed / "logs")
        if (partial / "config.yaml").is_file():
            (partial / "config.yaml").rename(failed / "config.yaml")
        for path in [path for name in (LEDGER_FILE, OPENINGS_FILE) for path in partial.rglob(name)]:
            kept = failed / path.relative_to(partial)
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
        for path in [partial / ROOT_FILE, *partial.glob(f"parties/*/identity/{ROOT_FILE}")]:
            if path.is_file():
                path.replace(failed / ROOT_FILE)
        # What a failed run released stays released: its privacy ledgers are kept.
        for ledger in partial.glob("parties/*/*-privacy.json"):
            ledger.rename(failed / ledger.name)
    shutil.rmtree(partial, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of the packages results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def train(config: Config, out: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Train in local processes; return the summary. Raises `RunFailedError` naming the failed party."""
    config = config.with_values(task="train")
    with run_directory(out) as directory:
        write_text(directory / "config.yaml", config.to_yaml())
        began = time.monotonic()
        launch(config, directory, progress)
        aggregator = directory / "parties" / "aggregator"
        for name in ("model.safetensors", "metrics.jsonl", OPENINGS_FILE, LEDGER_FILE):
            (aggregator / name).rename(directory / name)
        _forget_identities(config, directory)
        global_metrics = read_json_lines(directory / "metrics.jsonl")
        hospitals = [name for name in party_names(config) if name.startswith("hospital-")]
        privacy, skipped = [], 0
        for name in hospitals:
            last = read_json_lines(directory / "parties" / name / "metrics.jsonl")[-1]
            skipped += last["skipped_files"]
            privacy.append(
                {
                    "hospital": name,
                    "epsilon": last["epsilon"],
                    "delta": config.privacy.delta,
                    "noise_multiplier": last["noise_multiplier"],
                    "target_epsilon": config.privacy.epsilon,
                    "mechanism": config.privacy.mechanism,
                    "per_sample_gradients": last["method"],
                }
            )
        summary = {
            "kind": "train",
            "name": config.name,
            "synthetic": config.data.source == "phantoms",
            "rounds": config.training.rounds,
            "parameters": count_parameters(directory / "model.safetensors", config),
            "hospitals": hospitals,
            "skipped_files": skipped,
            "seconds": round(time.monotonic() - began, 2),
            "command": command,
            "versions": versions(),
            "final": global_metrics[-1]["evaluation"],
            "privacy": privacy,
        }
        write_json(directory / "summary.json", summary)
        write_report(directory)
    return summary


def count_parameters(path: Path, config: Config) -> int:
    """Number of trainable parameters of a model file."""
    return sum(parameter.numel() for parameter in load_model(path, config).parameters() if parameter.requires_grad)


def infer(config: Config, out: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Encrypted diagnosis in local processes; return the summary. Raises `RunFailedError`, `ModelError`, `DataError`."""
    config = config.with_values(task="infer")
    if config.site.model is None:
        raise ConfigError("no model was given", "pass --model FILE")
    # What is wrong with model, network or images is told before processes start.
    private_graph(config, load_model(config.site.model, config))
    images = load_images(config.site.images, config, config.inference.limit)
    with run_directory(out) as directory:
        write_text(directory / "config.yaml", config.to_yaml())
        began = time.monotonic()
        launch(config, directory, progress)
        _forget_identities(config, directory)
        results = read_json_lines(directory / "parties" / "hospital-0" / "results.jsonl")
        comparison = _compare(config, images, results, directory) if config.inference.plaintext_reference else None
        summary = {
            "kind": "infer",
            "name": config.name,
            "synthetic": config.data.source == "phantoms",
            "images": len(results),
            "skipped_files": images.skipped,
            "classes": list(config.data.classes),
            "seconds": round(time.monotonic() - began, 2),
            "seconds_per_image": round(sum(line["seconds"] for line in results) / len(results), 3),
            "command": command,
            "versions": versions(),
            "comparison": comparison,
            "results": results,
        }
        write_json(directory / "summary.json", summary)
        write_report(directory)
    return summary


def _compare(config: Config, images: Dataset, results: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    """The plaintext reference, computed by the user who has both model and images: for checking a simulation only."""
    assert config.site.model is not None
    model = load_model(config.site.model, config)
    torch.set_num_threads(1)
    began = time.monotonic()
    logits = predict(model, images.inputs, chunk=1)
    seconds = (time.monotonic() - began) / len(images.inputs)
    write_json(directory / "plaintext_reference.json", {"logits": logits.tolist(), "seconds": seconds})
    encrypted = torch.tensor([line["logits"] for line in results])
    return {
        "largest_logit_difference": float((encrypted - logits).abs().max()),
        "classes_agree": bool((encrypted.argmax(1) == logits.argmax(1)).all()),
        "plaintext_seconds_per_image": round(seconds, 4),
    }


def _forget_identities(config: Config, directory: Path) -> None:
    """Keys of a local run serve only that run; the authority's certificate stays, to verify the reveal ledger with."""
    root = directory / "parties" / party_names(config)[0] / "identity" / ROOT_FILE
    write_text(directory / ROOT_FILE, root.read_text(encoding="ascii"))
    for name in party_names(config):
        identity = directory / "parties" / name / "identity"
        if identity.is_dir():
            shutil.rmtree(identity)


def report(run_dir: Path) -> Path:
    """Write the report of a finished run again. Raises `MpcFlError` when `run_dir` is not one."""
    if not (run_dir / "summary.json").is_file():
        raise MpcFlError(
            f"{run_dir} is not a finished run: it has no summary.json", "give the --out of a train or infer"
        )
    return write_report(run_dir)
