"""Accuracy against epsilon of local and distributed noise on the embedded default, as a table and a picture.

One training run per point, in real processes, about 30 s each on two idle cores:

    python benchmarks/accuracy_and_epsilon.py --picture docs/epsilon.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
SMALLEST_HOSPITAL = 800  # the embedded default gives each of three hospitals 800 training patients


def measure(epsilon: float, mechanism: str) -> dict[str, Any]:
    """Final evaluation of one run: accuracy and its 95 % interval."""
    settings = [f"privacy.epsilon={epsilon}", f"privacy.mechanism={mechanism}"]
    settings += [f"privacy.smallest_hospital={SMALLEST_HOSPITAL}"]
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "mpc_fl",
            "train",
            "configs/demo.yaml",
            "--out",
            f"{directory}/run",
            "--json",
        ]
        command += [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    final: dict[str, Any] = json.loads(done.stdout)["final"]
    return {"epsilon": epsilon, "mechanism": mechanism, **{k: final[k] for k in final if k.startswith("accuracy")}}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One line per mechanism with its interval."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for mechanism, marker in (("local", "o"), ("distributed", "s")):
        points = [result for result in results if result["mechanism"] == mechanism]
        x = [point["epsilon"] for point in points]
        axes.plot(x, [100 * point["accuracy"] for point in points], marker=marker, label=f"{mechanism} noise")
        low, high = ([100 * point[f"accuracy_{end}"] for point in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, alpha=0.2)
    axes.axhline(100 / 3, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set(xscale="log", xlabel="epsilon per patient (delta 1e-4)", ylabel="accuracy, %", ylim=(0, 100))
    axes.set_xticks(sorted({result["epsilon"] for result in results}), minor=False)
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.4)
    axes.legend(loc="lower right")
    axes.set_title("SYNTHETIC phantoms, three hospitals, eight rounds", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    results = []
    print("| epsilon | mechanism | accuracy | 95 % interval |\n| --- | --- | --- | --- |")
    for epsilon in arguments.epsilons:
        for mechanism in ("local", "distributed"):
            result = measure(epsilon, mechanism)
            results.append(result)
            interval = f"{100 * result['accuracy_low']:.1f} to {100 * result['accuracy_high']:.1f} %"
            print(f"| {epsilon:g} | {mechanism} | {100 * result['accuracy']:.1f} % | {interval} |", flush=True)
    if arguments.picture is not None:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
