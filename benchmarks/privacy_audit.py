"""Lower bounds on epsilon beside the accountant's, of honest runs: mechanisms local, distributed and none, two epsilons, five
times.

    python benchmarks/privacy_audit.py [--canaries N] [--at-once N] [--times N] [--rounds N] [--local-steps N] [--json]

Three hospitals; noise is calibrated to each epsilon at delta 1e-4 for all steps, of which each draws a third of the patients. One
line for each audit, and at the end whether every lower bound was below the upper one.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

import torch

from mpc_fl.apps.auditing.audited_config import AuditedRun, sample_rate
from mpc_fl.apps.auditing.privacy_audit import AuditPlan, audit_privacy
from mpc_fl.config.config import Config, parse_config
from mpc_fl.learning.privacy.accounting import PrivacyBudget, calibrate_noise_multiplier

MECHANISMS, EPSILONS, DELTA = ("local", "distributed", "none"), (2.0, 8.0), 1e-4
_SMALLEST, _SHARE = 600, 3


def configuration(mechanism: str, epsilon: float, options: argparse.Namespace) -> Config:
    """Three hospitals of 600 patients and more."""
    steps = {"rounds": options.rounds, "local_steps": options.local_steps, "per_sample_gradients": "hooks"}
    smallest = None if mechanism == "none" else _SMALLEST
    return parse_config(
        {
            "name": f"{mechanism}-{epsilon:g}",
            "training": {**steps, "batch_size": _SMALLEST // _SHARE},
            "privacy": {
                "mechanism": mechanism,
                "epsilon": epsilon,
                "delta": DELTA,
                "spare_rounds": 0,
                "smallest_hospital": smallest,
            },
        },
        "the benchmark",
    )


def measure(mechanism: str, epsilon: float, options: argparse.Namespace) -> dict[str, Any]:
    """One audit."""
    config, noise = configuration(mechanism, epsilon, options), None
    if mechanism != "none":
        rate = sample_rate(AuditedRun(config, None, options.at_once))
        steps = options.rounds * options.local_steps
        noise = calibrate_noise_multiplier(PrivacyBudget(epsilon * (1 - 1e-3), DELTA), rate, steps)
    run = AuditedRun(config, noise, options.at_once)
    plan = AuditPlan(run, max(1, round(options.canaries / options.at_once)), True)
    found = audit_privacy(plan, lambda *_: None)
    return {
        "mechanism": mechanism,
        "epsilon": epsilon if noise is not None else None,
        "noise_multiplier": noise,
        "canaries": plan.canaries,
        "delta": plan.delta,
        "bounds": [asdict(bound) for bound in found.bounds],
        "holds": not any(bound.contradicts for bound in found.bounds),
        "seconds": round(found.seconds, 1),
    }


def main() -> None:
    """Audit the whole matrix and print a line for each, or JSON. Exit status 1 where a bound contradicts the accountant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("canaries", 8000), ("at-once", 1000), ("times", 5), ("rounds", 4), ("local-steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for mechanism in MECHANISMS:
        for epsilon in EPSILONS if mechanism != "none" else (math.inf,) * len(EPSILONS):
            for time in range(options.times):
                results.append(measure(mechanism, epsilon if math.isfinite(epsilon) else EPSILONS[0], options))
                if not options.json:
                    _say(results[-1], time)
    holds = all(result["holds"] for result in results)
    print(json.dumps(results, indent=2) if options.json else f"every lower bound is below the upper one: {holds}")
    raise SystemExit(0 if holds else 1)


def _say(result: dict[str, Any], time: int) -> None:
    bounds = "   ".join(
        f"{bound['seen']}: {bound['lower']:.3f} <= "
        + ("no bound" if bound["upper"] is None else f"{bound['upper']:.3f}")
        for bound in result["bounds"]
    )
    print(
        f"{result['mechanism']:11} epsilon {result['epsilon']} ({time + 1}): {bounds}   {result['seconds']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
