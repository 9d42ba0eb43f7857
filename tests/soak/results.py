"""What a run left on the disk: complete where it succeeded, nothing half-written where it did not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpc_fl.config.loading import load_config
from mpc_fl.errors import MpcFlError
from mpc_fl.federation.peer_state import COMMON
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.roles import AGGREGATOR
from tests.soak.plan import HOSPITALS, SETTINGS

_OF_TRAINING = ("config.yaml", "model.safetensors", "metrics.jsonl", "openings.jsonl", "reveal_ledger.jsonl", "federation.crt",
                "summary.json", "report.html")  # fmt: skip
_MODEL = "model.safetensors"
_OF_DIAGNOSIS = ("config.yaml", "summary.json", "report.html")
_CHECKPOINTS = (f"parties/{AGGREGATOR}/checkpoint-*.safetensors", f"parties/*/{COMMON}/checkpoint-*.safetensors")


def beside(out: Path, ending: str) -> Path:
    """`out` while a run works (".partial") or after it failed (".failed")."""
    return out.with_name(out.name + ending)


def resumable(out: Path) -> bool:
    """Whether a round of a run that did not succeed was completed."""
    places = [beside(out, ending) for ending in (".partial", ".failed")]
    return any(path for place in places for pattern in _CHECKPOINTS for path in place.glob(pattern))


def _missing(out: Path, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name} is missing or empty" for name in names if not (out / name).exists() or not (out / name).stat().st_size
    ]


def training_incomplete(out: Path) -> list[str]:
    """What a training run that ended with exit code 0 lacks; `mpc-fl ledger verify` is asked elsewhere."""
    found = _missing(out, _OF_TRAINING) + half_written(out)
    if found:
        return found
    config = load_config(out / "config.yaml", None)
    try:
        load_model(out / "model.safetensors", config)
    except MpcFlError as error:
        found.append(f"the model does not load: {error}")
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    if rounds != list(range(config.training.rounds + 1)):
        found.append(f"metrics.jsonl has rounds {rounds}")
    found += [f"{path} is still there" for path in out.glob("parties/*/identity")]
    kept = [list(party.glob("checkpoint-*")) for party in (out / "parties").iterdir()]  # one, for more rounds
    found += [f"{paths[0]} is not the only one" for paths in kept if len(paths) > 1]
    return found + [f"{path} exists as well" for path in (beside(out, ".partial"),) if path.exists()]


def another_model(out: Path, undisturbed: Path) -> list[str]:
    """Whether the model of a finished run differs from the one of a run that nobody disturbed, in any bit."""
    own, expected = load_file(out / _MODEL), load_file(undisturbed / _MODEL)
    same = own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    return [] if same else ["the model is not that of an undisturbed run"]


def lost_hospitals(out: Path) -> list[str]:
    """Those that a finished run lost, as its summary says."""
    return list(json.loads((out / "summary.json").read_text())["lost"])


def diagnosis_incomplete(out: Path, hospital: str = HOSPITALS[0]) -> list[str]:
    """What a diagnosis that ended with exit code 0 lacks."""
    found = _missing(out, _OF_DIAGNOSIS) + half_written(out)
    results = out / "parties" / hospital / "results.jsonl"
    count = len(results.read_text().splitlines()) if results.exists() else 0
    if count != SETTINGS["inference"]["limit"]:
        found.append(f"{count} results instead of {SETTINGS['inference']['limit']}")
    return found + [f"{path} exists as well" for path in (beside(out, ".partial"),) if path.exists()]


def failed_badly(out: Path) -> list[str]:
    """What is wrong with what a failed run left: only one that was killed itself may be unable to put anything away."""
    found = [f"{path} was left" for path in (out, beside(out, ".partial")) if path.exists()]
    return found + half_written(beside(out, ".failed"))


def half_written(directory: Path) -> list[str]:
    """Files that somebody did not write to their end."""
    found = [
        f"{path} is half-written" for path in directory.rglob("*") if ".partial" in path.name or path.suffix == ".new"
    ]
    for path in directory.rglob("*.jsonl"):
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            found.append(f"{path} ends in the middle of a line")
    return found
