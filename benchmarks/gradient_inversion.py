"""Gradient inversion on what leaves a hospital: similarity with the true image, of plaintext, noised, masked updates and sums.

    python benchmarks/gradient_inversion.py [--images N] [--times N] [--steps N] [--hospitals N] [--noise X] [--json]

Each time other phantoms and another start of the search. One line for each view and time; at the end whether the plaintext shows
its images (similarity 0.5 on average and more) and masked words do not (their fit is no better than chance has it, at 95 % for all
times together).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch

from mpc_fl.apps.auditing.inverted_updates import MASKED, PLAINTEXT, Attack, invert_updates
from mpc_fl.evidence.inversion import Search

_SHOWN, _LEVEL = 0.5, 0.05


def measure(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One attack on all views, by view."""
    began = time.monotonic()
    attack = Attack(options.images, options.hospitals, options.noise, Search(options.steps, seed=seed))
    found = invert_updates(attack, lambda *_: None).inversions
    seconds = round(time.monotonic() - began, 1)
    return [{**asdict(of), "similarity": of.mean, "seed": seed, "seconds": seconds} for of in found]


def main() -> None:
    """Attack several times and print a line for each view, or JSON. Exit status 1 where plaintext hides or masked words show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("images", 8), ("times", 5), ("steps", 300), ("hospitals", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.7, help="noise multiplier of the noised updates")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = list[dict[str, Any]]()
    for seed in range(options.times):
        results += measure(options, seed)
        for of in results[-4:] if not options.json else []:
            print(
                f"{of['view']:9} ({seed + 1}): similarity {of['similarity']:6.3f}, lowest {min(of['own']):6.3f}, "
                f"by chance {of['at_chance']:.2g}   {of['seconds']} s",
                flush=True,
            )
    shown = min(of["similarity"] for of in results if of["view"] == PLAINTEXT)
    chance = min(of["at_chance"] for of in results if of["view"] == MASKED)
    holds = shown >= _SHOWN and chance >= _LEVEL / options.times
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"plaintext shows images, and masked words do not: {holds}")
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
