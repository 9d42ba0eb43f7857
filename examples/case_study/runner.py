"""Runs the steps of the study one after the other, each with a deadline; a step that has its result already is passed over.

Beside each step's results lies `OUT/steps/<name>.json`: its command, a digest of all it was made of (command, configuration, films,
steps before it), status and time. With the same digest it is not run again. So an interrupted study goes on, and other settings
or films make anew what follows from them. A step that fails stops none but those that need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from case_study import films
from case_study.steps import CONFIGS, REPOSITORY, Step, Study
from mpc_fl.apps.rows import read_object
from mpc_fl.errors import DataError
from mpc_fl.files import write_json

Outcome = Literal["done", "failed", "left out", "not run"]
NOT_RUN: Outcome = "not run"
_FEWEST_SECONDS, _TIMES = 900.0, 5.0  # of a deadline: whatever a step should take, and how often that
_ENDING_SECONDS = 30.0  # a command cleans up after itself when it is told to end
_STEP_SECONDS = 0.1
_LONGEST = 500  # letters of what a failed command said


@dataclass(frozen=True)
class Record:
    """What became of a step: `command` for a shell, with DIR and OUT for paths; `made_of` is a digest; `said` the last line
    that it wrote to standard error, of one that failed, or why it was not run."""

    name: str
    outcome: str
    command: str
    made_of: str = ""
    status: int | None = None
    seconds: float = 0.0
    said: str = ""


def record_file(study: Study, name: str) -> Path:
    """Where what became of a step is written down."""
    return study.out / "steps" / f"{name}.json"


def read_record(study: Study, step: Step) -> Record:
    """What became of a step, also in an earlier study of this directory."""
    try:
        return read_object(Record, record_file(study, step.name).parent, f"{step.name}.json")
    except DataError:  # missing, or cut off by what ended the study
        return Record(step.name, NOT_RUN, shown(study, step))


def shown(study: Study, step: Step) -> str:
    """The command as a reader can give it, with DIR and OUT for paths."""
    places = {str(study.out): "OUT", str(study.data): "DIR", f"{REPOSITORY}{os.sep}": ""}
    words = ["python", *step.command] if step.command[0].endswith(".py") else list(step.command)
    for place, name in places.items():
        words = [word.replace(place, name) for word in words]
    return shlex.join(words)


def films_digest(data: Path) -> str:
    """Of names and sizes of all films."""
    listed = [f"{path.relative_to(data).as_posix()} {path.stat().st_size}" for path in films.listed(data)]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def digests(study: Study, steps: Sequence[Step]) -> dict[str, str]:
    """What each step is made of, by its name."""
    found, data = dict[str, str](), films_digest(study.data)
    for step in steps:
        files = [Path(word) for word in step.command if word.startswith(str(CONFIGS))]
        texts = [shown(study, step), data, *(path.read_text("utf-8") for path in files)]
        texts += [found[name] for name in step.needs]
        found[step.name] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return found


def chosen(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps with these names and those that they need; all without names. Raises `DataError` for a name of none."""
    by_name = {step.name: step for step in steps}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise DataError(f"there is no step '{unknown[0]}'", f"choose of {', '.join(by_name)}")
    wanted = set(names or by_name)
    for step in reversed(steps):
        wanted |= set(step.needs) if step.name in wanted else set()
    return [step for step in steps if step.name in wanted]


def has_result(record: Record, step: Step, made_of: str) -> bool:
    """Whether the result of a step is there, and made of what it would be made of now."""
    return record.outcome == "done" and record.made_of == made_of and step.result.exists()


def run_all(
    study: Study, steps: Sequence[Step], minutes: float, say: Callable[[str], None], made_of: Mapping[str, str]
) -> dict[str, Record]:
    """Run what has no result yet; what became of each step, by name. A step that would not end within `minutes` is left out."""
    began, found = time.monotonic(), dict[str, Record]()
    for number, step in enumerate(steps, 1):
        record = read_record(study, step)
        place = f"[{number}/{len(steps)}] {step.name}"
        if has_result(record, step, made_of[step.name]):
            say(f"{place}: is there already")
            found[step.name] = record
            continue
        lacking = [name for name in step.needs if name in found and found[name].outcome != "done"]
        spent = (time.monotonic() - began) / 60
        if lacking:
            record = Record(
                step.name, "left out", shown(study, step), said=f"it needs {lacking[0]}, which has no result"
            )
        elif spent + step.minutes > minutes:
            why = f"{spent:.0f} of {minutes:.0f} minutes were spent, and it takes about {step.minutes:g}"
            record = Record(step.name, "left out", shown(study, step), said=why)
        else:
            left = sum(later.minutes for later in steps[number - 1 :])
            say(f"{place}: {step.about} (about {step.minutes:g} min; all that is left about {left:.0f} min)")
            record = run_step(study, step, made_of[step.name])
        write_json(record_file(study, step.name), asdict(record))
        found[step.name] = record
        say(f"{place}: {_told(record)}")
    return found


def _told(record: Record) -> str:
    if record.outcome == "done":
        return f"done in {record.seconds / 60:.1f} min"
    return f"{record.outcome.upper()}: {record.said}"


def last_line(file: Path) -> str:
    """The last line of what a command wrote, where errors of the product stand, cut where it is long."""
    lines = file.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:_LONGEST] if lines else "it said nothing"


def run_step(study: Study, step: Step, made_of: str) -> Record:
    """Run one step from its beginning, with nothing of an earlier attempt."""
    _clear(study, step)
    if step.command[0] == "mpc-fl":
        words = [sys.executable, "-m", "mpc_fl", *step.command[1:]]
    else:
        words = [sys.executable, str(REPOSITORY / step.command[0]), *step.command[1:]]
    output, error = (record_file(study, step.name).with_suffix(suffix) for suffix in (".stdout", ".stderr"))
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    deadline, began = max(_FEWEST_SECONDS, _TIMES * 60 * step.minutes), time.monotonic()
    with output.open("wb") as told, error.open("wb") as said:
        process = subprocess.Popen(
            words, stdout=told, stderr=said, stdin=subprocess.DEVNULL, cwd=REPOSITORY, env=environment, start_new_session=True
        )  # fmt: skip
        try:
            status: int | None = process.wait(deadline)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = time.monotonic() - began
    last = last_line(error)
    made = status in step.statuses and step.result.exists()
    if status is None:
        last = f"ended after {deadline / 60:.0f} minutes, its deadline; before, it said: {last}"
    outcome: Outcome = "done" if made else "failed"
    return Record(step.name, outcome, shown(study, step), made_of, status, round(seconds, 1), "" if made else last)


def _clear(study: Study, step: Step) -> None:
    """Remove what an earlier attempt left, which commands never overwrite."""
    run = study.run(step.name)
    for path in (run, run.with_name(f"{run.name}.partial"), run.with_name(f"{run.name}.failed")):
        shutil.rmtree(path, ignore_errors=True)
    record_file(study, step.name).unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs and what it started, where its deadline has passed or this process is interrupted.

    One that has ended by itself has ended its parties, and its number may be another process's by now.
    """
    if process.poll() is not None:
        return
    process.terminate()  # it ends its parties itself, if it can
    waited = 0.0
    while waited < _ENDING_SECONDS and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(_STEP_SECONDS)
        waited += _STEP_SECONDS
    with contextlib.suppress(ProcessLookupError):  # not reaped yet, so its number is still its own, and its group's
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
