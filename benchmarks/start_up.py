"""What it takes until something happens: the command's help, a diagnosis of the demo, the imports of each role.

    python benchmarks/start_up.py [--model FILE] [--against CHECKOUT] [--repeats N] [--json]

Wall and processor time of `mpc-fl --help` and of `mpc-fl infer` with plaintext reference, with all processes that these
start; seconds from the command until each role has finished; processor time of what a role imports in a fresh interpreter;
the largest peak of memory of a party. Without `--model` one is trained (a minute). With `--against` an older checkout with
an environment of its own in CHECKOUT/.venv is measured too, in turn with this one, and ratios of the medians are printed: one busy
neighbour slows both. Each measurement is the median of N.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
# What a role runs for a task, beside its module in `parties`; an older checkout imports all of it there.
ROLES = {
    "hospital, training": ("parties.hospital", "mpc_fl.federation.hospital_program"),
    "hospital, diagnosis": ("parties.hospital", "mpc_fl.inference.hospital_program", "mpc_fl.inference.fast.diagnosis"),
    "aggregator": ("parties.aggregator", "mpc_fl.federation.aggregator_program"),
    "dealer, diagnosis": ("parties.dealer", "mpc_fl.inference.fast.preprocessing.dealer"),
    "model owner": ("parties.model_owner", "mpc_fl.inference.fast.diagnosis"),
}
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(error.name or "?"):
            raise
"""
TIMEOUT = 600
_FINISHED = re.compile(r"^(\S+ \S+) INFO mpc_fl\S*: (\S+) has finished", re.MULTILINE)
_PEAK = re.compile(r"peak memory was (\d+) MB")


class Checkout:
    """A copy of the project with an interpreter, old or new."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        own = directory / ".venv" / "bin" / "python"
        self.python = str(own) if own.exists() and directory != HERE else sys.executable
        self.module = "mpc_fl" if (directory / "mpc_fl" / "__main__.py").exists() else "mpc_fl.cli"
        self.config = str(directory / "configs" / "demo.yaml")

    def run(self, *arguments: str) -> tuple[float, float]:
        """Wall and processor seconds of an interpreter, with everything it starts. Fails as it fails."""
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(self.directory)}
        done = subprocess.run(
            [self.python, *arguments], cwd=self.directory, env=environment, capture_output=True, timeout=TIMEOUT
        )
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise SystemExit(f"{self.directory}: {' '.join(arguments)} failed: {done.stderr.decode()[-2000:]}")
        return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def train(self, out: Path) -> Path:
        """A model for the demo."""
        self.run("-m", self.module, "train", self.config, "--out", str(out))
        return out / "model.safetensors"

    def help(self) -> dict[str, float]:
        """Seconds of `mpc-fl --help`."""
        wall, processor = self.run("-m", self.module, "--help")
        return {"help: wall s": wall, "help: processor s": processor}

    def diagnosis(self, model: Path, directory: Path) -> dict[str, float]:
        """Seconds of the demo's diagnosis, until each party has finished, and MB of the largest party."""
        out, began = directory / "run", datetime.now()
        wall, processor = self.run(
            *("-m", self.module, "infer", self.config, "--model", str(model), "--out", str(out)),
            *("--set", "inference.plaintext_reference=true"),
        )
        found = {"diagnosis: wall s": wall, "diagnosis: processor s": processor}
        peaks = []
        for log in sorted((out / "logs").iterdir()):
            text = log.read_text()
            peaks += [float(peak) for peak in _PEAK.findall(text)]
            for when, party in _FINISHED.findall(text):
                finished = datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f")
                found[f"diagnosis: until {party} has finished, s"] = (finished - began).total_seconds()
        return {**found, "diagnosis: peak memory of a party, MB": max(peaks)}

    def imports(self, role: str) -> dict[str, float]:
        """Processor seconds of importing a role's program (of diagnosis with the engine `fast`) in a fresh interpreter."""
        return {f"imports of {role}: processor s": self.run("-c", _IMPORT, *ROLES[role])[1]}


def measured(checkout: Checkout, model: Path) -> dict[str, float]:
    """Every figure, once."""
    found = checkout.help()
    with tempfile.TemporaryDirectory(prefix="mpc-fl-start-up-") as directory:
        found |= checkout.diagnosis(model, Path(directory))
    for role in ROLES:
        found |= checkout.imports(role)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model.safetensors of the demo; without, one is trained")
    parser.add_argument("--against", type=Path, help="an older checkout with a .venv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkouts = [Checkout(HERE)] + ([Checkout(arguments.against.resolve())] if arguments.against else [])
    runs: list[list[dict[str, float]]] = [[] for _ in checkouts]
    with tempfile.TemporaryDirectory(prefix="mpc-fl-start-up-") as directory:
        model = arguments.model.resolve() if arguments.model else checkouts[0].train(Path(directory) / "model")
        for checkout in checkouts:
            checkout.help()  # compiles what is not compiled yet
        for _ in range(arguments.repeats):
            for checkout, found in zip(checkouts, runs, strict=True):
                found.append(measured(checkout, model))
    medians = [{name: statistics.median(run[name] for run in found) for name in found[0]} for found in runs]
    if arguments.json:
        names = ["here", "against"][: len(medians)]
        print(json.dumps({"repeats": arguments.repeats, **dict(zip(names, medians, strict=True))}))
        return
    print(f"{'':50}{'here':>10}" + (f"{'against':>10}{'ratio':>8}" if arguments.against else ""))
    for name, value in medians[0].items():
        other = medians[-1].get(name) if arguments.against else None
        print(f"{name:50}{value:10.2f}" + (f"{other:10.2f}{value / other:8.2f}" if other else ""))


if __name__ == "__main__":
    main()
