"""How much noise each accountant asks for in the shipped configurations, and how long calibration takes.

    python benchmarks/accountants.py [--json]

Noise multipliers at epsilon 8 (as shipped) and 1; seconds of processor time with the libraries loaded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, get_args

from mpc_fl.config.loading import load_config
from mpc_fl.federation.planning import rounds_to_come, sample_rate_of
from mpc_fl.learning.privacy.accounting import Accountant, PrivacyBudget, calibrate_noise_multiplier

CONFIGURATIONS = ("demo", "breast_cancer", "chest_xray_small", "chest_xray_resnet18", "chest_xray")


def measure(name: str, epsilon: float) -> dict[str, Any]:
    """Noise multiplier and seconds of each accountant."""
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    rate, steps = sample_rate_of(config, 0), rounds_to_come(config) * config.training.local_steps
    result: dict[str, Any] = {"configuration": name, "epsilon": epsilon, "sampling_rate": rate, "steps": steps}
    for accountant in get_args(Accountant):
        budget = PrivacyBudget(epsilon, config.privacy.delta, accountant)
        began = time.process_time()
        result[accountant] = calibrate_noise_multiplier(budget, rate, steps)
        result[f"{accountant}_seconds"] = time.process_time() - began
    return {**result, "saved": 1 - result["pld"] / result["rdp"]}


def main() -> None:
    """Measure all configurations and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    calibrate_noise_multiplier(PrivacyBudget(8.0, 1e-4, "prv"), 0.1, 1)  # loads the libraries
    results = [measure(name, epsilon) for name in CONFIGURATIONS for epsilon in (8.0, 1.0)]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(
        f"{'configuration':18} {'epsilon':>7} {'rate':>6} {'steps':>5}   noise multiplier and seconds: pld, rdp, prv   saved"
    )
    for line in results:
        figures = "  ".join(f"{line[name]:7.4f} {line[f'{name}_seconds']:5.2f} s" for name in get_args(Accountant))
        print(
            f"{line['configuration']:18} {line['epsilon']:7g} {line['sampling_rate']:6.3f} {line['steps']:5}   {figures}   "
            f"{line['saved']:5.1%}"
        )


if __name__ == "__main__":
    main()
