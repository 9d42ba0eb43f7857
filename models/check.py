"""Check `rounds.pml` with Spin: that its properties hold, and that each fails when the rule that carries it is taken out.

python models/check.py                 all checks, a table as in README.md
python models/check.py NAME...         some of them
python models/check.py --seconds 600   on a machine that does other things
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).parent / "rounds.pml"
LIMIT_MEGABYTES = 2000
LIMIT_SECONDS = 60

# What an assertion that fails says, by the property that it stands for.
PROPERTIES = {
    "one set under one label": r"signed_set\[|opened_over\[",
    "no sum below the quorum": r">>0\)&1\)\+",
    "no mask before all have signed": r"signed_transcript\[",
    "no charge forgotten": r"released\[",
    "no opening forgotten": r"gave_keys\[",
    "one block of a round": r"kept\[i\]==kept\[h\]",
    "progress": r"live<",
}


@dataclass(frozen=True)
class Check:
    """One verification: a name, what the model is made with, and which property must fail, if any.

    `is_small` ones take seconds and are in the tests.
    """

    name: str
    made_with: str
    fails: str = ""
    is_small: bool = True

    @property
    def defines(self) -> list[str]:
        """Arguments of Spin's preprocessor."""
        return [f"-D{word}" for word in self.made_with.split()]


@dataclass(frozen=True)
class Found:
    """What Spin found: the property that failed ("" for none), states, seconds, and whether it looked at all of them."""

    failed: str
    states: int
    seconds: float
    is_whole: bool

    def is_as(self, check: Check) -> bool:
        """Whether that is what the check wants."""
        return self.failed == check.fails and (bool(check.fails) or self.is_whole)


def verify(check: Check, directory: Path, limit_seconds: float = LIMIT_SECONDS) -> Found:
    """Run Spin in an empty directory. Raises `CalledProcessError` where the model does not compile, `TimeoutExpired`."""
    began = time.monotonic()
    (directory / MODEL.name).write_bytes(MODEL.read_bytes())

    def run(*command: str, seconds: float | None = None) -> str:
        return subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=True, timeout=seconds
        ).stdout

    run("spin", "-a", *check.defines, MODEL.name)
    compiler = ["tcc"] if shutil.which("tcc") else ["gcc", "-O1"]  # gcc compiles longer than most checks take
    run(*compiler, "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={LIMIT_MEGABYTES}", "-o", "pan", "pan.c")
    out = run("./pan", "-m100000", "-w20" if check.is_small else "-w24", seconds=limit_seconds)
    violated = re.search(r"assertion violated (.*) \(at depth", out)
    failed = ""
    if violated is not None:
        failed = next((name for name, says in PROPERTIES.items() if re.search(says, violated[1])), violated[1])
    states = re.search(r"(\d+) states, stored", out)
    whole = "errors: 0" in out and "Search not completed" not in out and "max search depth too small" not in out
    return Found(failed, int(states[1]) if states else 0, time.monotonic() - began, whole)


_THREE_LOST = (
    "QUORUM=2 VIEWS=3 LOSSES=1"  # a quorum of two is refused in a run; here it lets three hospitals stand for more
)
_FOUR_LOST = "HOSPITALS=4 QUORUM=3 VIEWS=3 LOSSES=1"
_BLOCK = "QUORUM=2 VIEWS=2 LOSSES=1 LATES=2 LATE_FROM=SIGNED LOSS_FROM=SIGNED"
_STOP = "QUORUM=2 VIEWS=2 LOSSES=1 RESUMES=1 LOSS_FROM=SIGNED"
_RETURN = "QUORUM=2 VIEWS=2 LOSSES=2 RETURNS=1 LATES=1 LATE_FROM=SIGNED LOSS_FROM=SIGNED"
_FOUR_PROPOSER = "HOSPITALS=4 QUORUM=3 VIEWS=1 DEVIATING=0"
_TWO_BLOCKS = "HOSPITALS=4 QUORUM=3 VIEWS=4 DEVIATING=1 FROM_TWO_BLOCKS LATES=1"

CHECKS = (
    Check("three", "VIEWS=2 PROGRESS"),
    Check("three, one is late", "VIEWS=2 LATES=1 PROGRESS"),
    Check("three, a quorum of two, one is lost", f"{_THREE_LOST} PROGRESS"),
    Check("three, the proposer deviates", "VIEWS=2 DEVIATING=0"),
    Check("three, a hospital deviates", "VIEWS=2 DEVIATING=2"),
    Check("three, a quorum of two, the block alone: one is lost, two are late", _BLOCK),
    Check("three, all stop and go on", "VIEWS=2 RESUMES=1 PROGRESS"),
    Check("three, a quorum of two, one is lost with the block and all stop", _STOP),
    Check("three, a quorum of two, one is lost with the block and another comes back", _RETURN, is_small=False),
    Check("three, a quorum of two, the proposer deviates", "QUORUM=2 VIEWS=1 DEVIATING=0", "one set under one label"),
    Check("four, one is lost", f"{_FOUR_LOST} PROGRESS", is_small=False),
    Check("four, the proposer deviates", _FOUR_PROPOSER, is_small=False),
    Check("four, a hospital deviates", "HOSPITALS=4 QUORUM=3 VIEWS=2 DEVIATING=3", is_small=False),
    Check("four, one that deviates has an older block", _TWO_BLOCKS),
    Check("four, one is late", "HOSPITALS=4 QUORUM=3 VIEWS=2 LATES=1 PROGRESS", is_small=False),
    Check("four, all stop and go on", "HOSPITALS=4 QUORUM=3 VIEWS=2 RESUMES=1 PROGRESS", is_small=False),
    *(
        Check(f"without the rule {rule}", f"{made_with} WITHOUT_RULE_{rule}", fails)
        for rule, made_with, fails in (
            ("ALL_SIGNED", "VIEWS=2 DEVIATING=2", "no mask before all have signed"),
            ("ALL_CONFIRMED", _FOUR_PROPOSER, "one set under one label"),
            ("ANEW", _THREE_LOST, "one set under one label"),
            ("QUORUM", "LOSSES=1", "no sum below the quorum"),
            ("CHARGE_FIRST", _THREE_LOST, "no charge forgotten"),
            ("RECORD_FIRST", _THREE_LOST, "no opening forgotten"),
            ("COMPLETE", _BLOCK, "one block of a round"),
            ("FINISH", _BLOCK, "one block of a round"),
            ("FINISHED_BY_QUORUM", _TWO_BLOCKS, "one block of a round"),
            ("RECALL", _RETURN, "one block of a round"),
            ("SETTLE", f"{_THREE_LOST} PROGRESS", "progress"),
            ("NEXT_PROPOSER", f"{_THREE_LOST} PROGRESS", "progress"),
            ("DEADLINE", f"{_THREE_LOST} PROGRESS", "progress"),
            ("TOO_FEW_IS_A_LOST_SUM", f"{_THREE_LOST} PROGRESS", "progress"),
            ("VOID_IS_NO_LOSS", f"{_FOUR_LOST} WITHOUT_RULE_ENOUGH_WITHOUT_THE_BLAMED PROGRESS", "progress"),
            ("ENOUGH_WITHOUT_THE_BLAMED", "VIEWS=2 LATES=1 PROGRESS", "progress"),
        )
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checks of these names, or all; print a table; 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description="check rounds.pml with Spin")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a check")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="that one may take")
    asked, wrong = parser.parse_args(arguments), 0
    print("| check | made with | found | states | seconds |\n|---|---|---|---|---|", flush=True)
    for check in CHECKS:
        if asked.names and check.name not in asked.names:
            continue
        with tempfile.TemporaryDirectory() as directory:
            try:
                found = verify(check, Path(directory), asked.seconds)
            except subprocess.TimeoutExpired:
                found = Found("", 0, asked.seconds, False)
        wrong += not found.is_as(check)
        what = (
            f"fails: {found.failed}" if found.failed else "all holds" if found.is_whole else "not all states were seen"
        )
        row = f"| {check.name} | `{check.made_with}` | {what} | {found.states:,} | {found.seconds:.0f} |"
        print(row if found.is_as(check) else f"{row} WRONG", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
