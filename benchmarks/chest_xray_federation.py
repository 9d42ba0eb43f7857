"""What real federations reach on real chest X-rays: `mpc-fl train` by its command, three hospitals as processes, secure sums.

    python benchmarks/chest_xray_federation.py --data DIR > federation.json

DIR as for `chest_xray_table.py`. Each line of the table in docs/results.md is trained `--runs` times, with fresh noise and the
seeds 1, 2, ... that divide the patients. Figures are those that the hospitals' secure sum opened. All 319 test records count, those
of patients with a training patient's name too, as in the table. Prints JSON: for every line means, and each run with its time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
NORMALISE_NOISE = 2.7 * 8  # times 1 / epsilon: a tenth of the budget
LITE0 = "8601c9ea396013b30ad83d20fd807105937e97c949ec69c298b121392715d197"
# The last convolution of the network, its normalisation and the head: 416,003 parameters, so a step is long, and there are fewer.
LAST_BLOCK = {
    "data.features": "null",
    "data.channels": 3,
    "data.normalise": "weights",
    "model.architecture": "efficientnet_lite0",
    "model.initial_weights": LITE0,
    "training.trainable": "last:3",
    "training.rounds": 4,
    "training.learning_rate": 0.1,
    "training.average_last": 10,
    "privacy.clipping_norm": 1.0,
}
# With local noise a round is one step, as with distributed noise every step is a sum.
LOCAL = {"training.strategy": "fedsgd", "training.rounds": 60, "training.local_steps": 1}


@dataclass(frozen=True)
class Line:
    """One line: what is trained, the head alone or the last block with it, and what the mean over runs should reach."""

    config: str
    epsilon: float
    mechanism: str
    accuracy_wanted: float
    area_wanted: float
    trained: Literal["head", "last block"] = "head"

    @property
    def name(self) -> str:
        """As `--lines` takes it."""
        model = self.config.removeprefix("chest_").removeprefix("xray").strip("_") or "lite0"
        model += "-last-block" if self.trained == "last block" else ""
        return f"{model}-{self.epsilon:g}-{self.mechanism}"

    @property
    def settings(self) -> list[str]:
        """Arguments of `mpc-fl train`."""
        values: dict[str, Any] = {
            "data.shared_patients": "keep",
            "privacy.epsilon": self.epsilon,
            "privacy.mechanism": self.mechanism,
            "data.normalise_noise_multiplier": round(NORMALISE_NOISE / self.epsilon, 3),
            **({"training.learning_rate": 15} if self.epsilon <= 1 and self.config == "chest_xray" else {}),
            **(LOCAL if self.mechanism == "local" else {}),
            **(LAST_BLOCK if self.trained == "last block" else {}),
        }
        return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


LINES = (
    Line("chest_xray", 8, "distributed", 0.77, 0.91),
    Line("chest_xray", 8, "local", 0.76, 0.91),
    Line("chest_xray", 1, "distributed", 0.745, 0.89),
    Line("chest_xray", 1, "local", 0.735, 0.89),
    Line("chest_xray_scattering", 8, "distributed", 0.74, 0.90),
    Line("chest_xray_scattering", 8, "local", 0.73, 0.90),
    Line("chest_xray", 8, "distributed", 0.0, 0.0, "last block"),  # compared, whatever it gives
)


def train(line: Line, data: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """One run: its figures, the largest epsilon of a hospital, and seconds from the command to its end."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "mpc_fl",
            "train",
            str(REPOSITORY / "configs" / f"{line.config}.yaml"),
            "--json",
        ]
        command += ["--data", str(data), "--out", f"{directory}/run", *line.settings, "--set", f"seed={seed}"]
        command += [word for setting in settings for word in ("--set", setting)]
        began = time.monotonic()
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        summary = json.loads(done.stdout)
    final = {
        name: summary["final"][name]
        for name in ("records", "accuracy", "balanced_accuracy", "auc_macro", "auc_resolution")
    }
    spent = max(entry["epsilon"] for entry in summary["privacy"])
    return {"seed": seed, **final, "epsilon_spent": round(spent, 3), "seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="DIR with {train,test}/<class>/")
    parser.add_argument(
        "--lines", nargs="+", choices=[line.name for line in LINES], default=[line.name for line in LINES]
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all runs")
    arguments = parser.parse_args()
    found = []
    for line in LINES:
        if line.name not in arguments.lines:
            continue
        runs = []
        for seed in range(1, arguments.runs + 1):
            runs.append(train(line, arguments.data.resolve(), seed, arguments.set))
            print(line.name, json.dumps(runs[-1]), file=sys.stderr, flush=True)
        mean = {name: round(sum(run[name] for run in runs) / len(runs), 4) for name in ("accuracy", "auc_macro")}
        reached = mean["accuracy"] >= line.accuracy_wanted and mean["auc_macro"] >= line.area_wanted
        found.append({"line": line.name, **asdict(line), "mean": mean, "reached": reached, "runs": runs})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
