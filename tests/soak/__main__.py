"""Break real runs at random, and say whether anything bad came of it: `python -m tests.soak --help`, or `make soak`.

Each injection starts a small run on this machine, sends a random signal to a random party, to the launcher or to the process
that parties are forked from, at a random moment, and judges what follows (`judging.py`, `results.py`). What is bad is kept with its
logs; `--seed S --first N --injections 1` repeats one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.soak.plan import VARIANTS, Injection, injection
from tests.soak.runs import Usual, Verdict, inject, measure

TASKS = ("train", "infer", "serve", "peers")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--injections", type=int, help="stop after so many that struck somebody")
    parser.add_argument(
        "--minutes", type=float, help="begin none after so many minutes (default: 60 without --injections)"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--first", type=int, default=1, help="number of the first injection")
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all", help="peers: without an aggregator")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new directory; keeps what was bad")
    parser.add_argument("--json", action="store_true", help="the summary for machines")
    return parser.parse_args()


def main() -> int:
    """Exit code 0 where nothing was bad, else 1."""
    said = arguments()
    tasks, out = TASKS if said.task == "all" else (said.task,), said.out.absolute()
    if out.exists():
        sys.exit(f"soak: {out} exists already: choose another --out, or move it away")
    minutes = 60.0 if said.minutes is None and said.injections is None else said.minutes
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    out.mkdir(parents=True)
    _say(f"seed {said.seed}; what is bad is kept in {out}")
    usual, model = _measured(out, tasks)
    verdicts = list[Verdict]()
    with (out / "verdicts.jsonl").open("w") as record:
        for verdict in _verdicts(said, tasks, until, lambda chosen: _one(chosen, out, model, usual)):
            verdicts.append(verdict)
            record.write(json.dumps(asdict(verdict)) + "\n")
            record.flush()
            _say(_words(verdict))
    summary = summarise(said.seed, verdicts)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    if said.json:
        print(json.dumps(summary))
    _say(f"{summary['injections']} injections, {len(summary['bad'])} bad; {summary['missed']} struck nobody any more")
    return 1 if summary["bad"] else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _words(verdict: Verdict) -> str:
    how = "struck nobody" if not verdict.struck else f"exit code {verdict.code}"
    bad = "".join(f"\n    BAD {what}" for what in verdict.bad)
    return f"{verdict.injection.words}: {how}{', ' + verdict.followed if verdict.followed else ''} {verdict.line}{bad}"


def _measured(out: Path, tasks: tuple[str, ...]) -> tuple[dict[str, Usual], Path]:
    """How long undisturbed runs of each kind take; the first leaves the model that is diagnosed with."""
    usual, model = dict[str, Usual](), out / "undisturbed" / "train" / "run" / "model.safetensors"
    for name, variant in VARIANTS.items():
        if variant.group in tasks or name == "train":
            directory = out / "undisturbed" / name.replace(",", "").replace(" ", "-")
            directory.mkdir(parents=True)
            usual[name] = measure(directory, name, model)
            _say(f"{name}: {usual[name].seconds:.1f} s when undisturbed")
    return usual, model


def _one(chosen: Injection, out: Path, model: Path, usual: dict[str, Usual]) -> Verdict:
    directory = out / str(chosen.number)
    directory.mkdir()
    verdict = inject(chosen, directory, model, usual[chosen.variant])
    if not verdict.bad:
        shutil.rmtree(directory)
    return verdict


def _verdicts(
    said: argparse.Namespace, tasks: tuple[str, ...], until: float, do: Callable[[Injection], Verdict]
) -> Iterator[Verdict]:
    """In the order in which they come; those that struck nobody do not count."""
    number, struck, working = said.first, 0, set[Future[Verdict]]()
    wanted = float("inf") if said.injections is None else said.injections
    with ThreadPoolExecutor(said.at_once) as pool:
        while True:
            while len(working) < min(said.at_once, wanted - struck) and time.monotonic() < until:
                working.add(pool.submit(do, injection(said.seed, number, tasks)))
                number += 1
            if not working:
                return
            done, working = wait(working, return_when=FIRST_COMPLETED)
            for future in done:
                struck += future.result().struck
                yield future.result()


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


def summarise(seed: int, verdicts: list[Verdict]) -> dict[str, Any]:
    """How many of each kind, and all that was bad."""
    struck = [verdict for verdict in verdicts if verdict.struck]
    return {
        "seed": seed,
        "injections": len(struck),
        "missed": len(verdicts) - len(struck),
        "by_signal": _counted(verdict.injection.signal for verdict in struck),
        "by_victim": _counted(verdict.injection.victim for verdict in struck),
        "by_run": _counted(verdict.injection.variant for verdict in struck),
        "exit_codes": _counted(str(verdict.code) for verdict in struck),
        "followed": _counted(verdict.followed for verdict in struck if verdict.followed),
        "longest_seconds_to_the_end": max((verdict.seconds or 0.0 for verdict in struck), default=0.0),
        "bad": [{**asdict(verdict.injection), "bad": verdict.bad} for verdict in verdicts if verdict.bad],
    }


if __name__ == "__main__":
    raise SystemExit(main())
