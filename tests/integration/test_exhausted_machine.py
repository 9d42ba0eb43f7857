"""What runs out while a command works, and outputs that nobody reads: one line, the right exit status, nothing lost that was won.

Limits are those of the process (`ulimit`), so that no file system has to be filled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.runs import party_log
from mpc_fl.apps.runs.party_process import unforeseen
from mpc_fl.apps.runs.run_directory import require_free, run_directory
from mpc_fl.apps.summaries import ImageResult
from mpc_fl.errors import ConfigError, ExhaustedError, MpcFlError
from mpc_fl.files import read_json_lines

CONFIG = """
name: small
data: {source: phantoms, image_size: 8, phantoms: {train_patients: 60, test_patients: 30}}
model: {architecture: mlp, hidden: [8]}
training: {rounds: 1, local_steps: 1, batch_size: 4, per_sample_gradients: loop}
privacy: {delta: 0.01}
federation: {hospitals: 2}
inference: {engine: fast, limit: 2}
"""
REPORT_TOO_LARGE = 40_000  # bytes: models, ledgers and databases of the run above are smaller, its reports larger


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


def mpc_fl(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpc_fl", *map(str, arguments)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(command, text=True, timeout=300, check=False, **more)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed, after bars of progress."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpc-fl: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr and "Logging error" not in done.stderr, done.stderr
    assert "defect" not in lines[0] and done.stderr.rstrip().endswith(lines[0]), done.stderr
    return lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
@pytest.mark.processes
def test_a_training_whose_last_files_do_not_fit_goes_on_and_a_diagnosis_survives_its_report(
    config: Path, tmp_path: Path
) -> None:
    """On the old code the checkpoints and keys were gone when the report was written, so `--resume` refused; and the
    diagnoses went with their report."""
    run, too_large = tmp_path / "run", limit(resource.RLIMIT_FSIZE, REPORT_TOO_LARGE)
    done = mpc_fl("train", config, "--out", run, preexec_fn=too_large)
    assert done.returncode == ExhaustedError.exit_code, done.stderr
    assert complaint(done).startswith(f"mpc-fl: cannot write {run}.partial/report.html: File too large: ")
    assert "--resume" in complaint(done) and not run.exists()
    assert complaint(mpc_fl("train", config, "--out", run, "--resume", preexec_fn=too_large))
    done = mpc_fl("train", config, "--out", run, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and not list(run.rglob("*.key"))
    assert len(list(run.rglob("checkpoint-*"))) == 3  # one a party, for more rounds
    verified = mpc_fl("ledger", "verify", run, "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["findings"] == []

    diagnosis = tmp_path / "diagnosis"
    command = ["infer", config, "--model", run / "model.safetensors", "--out", diagnosis]
    done = mpc_fl(*command, "--json", preexec_fn=too_large)
    assert done.returncode == MpcFlError.exit_code
    assert "the diagnoses are written and the report is not" in complaint(done)
    said = json.loads(done.stdout)
    assert said["report"] is None and len(said["results"]) == 2
    assert said["model_file"]["signed"] is True and str(run / "reveal_ledger.jsonl") in said["model_file"]["words"]
    kept = read_json_lines(diagnosis / "parties" / "hospital-0" / "results.jsonl")
    assert [ImageResult(**line) for line in kept] == [ImageResult(**line) for line in said["results"]]
    assert not list(diagnosis.rglob("*.key"))
    assert mpc_fl("report", diagnosis).returncode == 0  # when there is room
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "model.safetensors").write_bytes(content)
    done = mpc_fl(*command[:-1], tmp_path / "changed")
    assert done.returncode == 4 and "is not the one that all parties signed" in complaint(done)


@pytest.mark.processes
def test_too_few_files_and_too_little_memory_are_told_in_one_line(config: Path, tmp_path: Path) -> None:
    done = mpc_fl("train", config, "--out", tmp_path / "run", preexec_fn=limit(resource.RLIMIT_NOFILE, 10))
    if done.returncode != -signal.SIGABRT:  # how a library of another language may end a process that gets no file
        assert done.returncode == ExhaustedError.exit_code
        assert complaint(done).startswith("mpc-fl: this machine ran out of files that a process may open: allow more")
    done = mpc_fl("train", config, "--out", tmp_path / "run2", preexec_fn=limit(resource.RLIMIT_AS, 200 << 20))
    assert done.returncode == ExhaustedError.exit_code
    assert complaint(done).startswith("mpc-fl: this machine ran out of memory: ")


# ---- standard output and error -----------------------------------------------------------------------------------------


def closed(*descriptors: int) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


@pytest.mark.parametrize("descriptors", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_closed_outputs_change_no_exit_status(config: Path, tmp_path: Path, descriptors: tuple[int, ...]) -> None:
    """On the old code `>&-` was a traceback, and the next file that was opened became standard output."""
    for arguments, status in ((["--version"], 0), (["check", tmp_path / "nowhere.yaml"], ConfigError.exit_code)):
        done = mpc_fl(*arguments, preexec_fn=closed(*descriptors))
        assert done.returncode == status
        assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    done = mpc_fl("pki", "init", tmp_path / "fed", "--no-passphrase", preexec_fn=closed(*descriptors))
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "fed").iterdir():
        assert path.name == "issued.jsonl" or path.read_bytes().startswith(b"-----BEGIN ") or not path.stat().st_size


def test_a_reader_that_goes_away_changes_no_exit_status(tmp_path: Path) -> None:
    for arguments, status in ((["--help"], 0), (["--version"], 0), (["ledger", "verify", tmp_path], 1)):
        reading, writing = os.pipe()
        os.close(reading)
        done = mpc_fl(*arguments, stdout=writing)
        os.close(writing)
        assert done.returncode == status and "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


def test_an_output_that_cannot_be_kept_is_an_error() -> None:
    for arguments in (["--version"], ["--help"]):
        with Path("/dev/full").open("w") as full:
            done = mpc_fl(*arguments, stdout=full)
        assert done.returncode == 1
        assert complaint(done) == (
            "mpc-fl: standard output cannot be written: No space left on device: send it to another place"
        )


# ---- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_on_a_full_disk_ends_nothing_and_prints_nothing_but_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    """On the old code: "--- Logging error ---" with a traceback for each event."""
    party_log.set_up_log(Path("/dev/full"))
    log = logging.getLogger("mpc_fl")
    for number in range(3):
        log.info("event %d", number)
    assert capfd.readouterr() == ("", "")
    party_log.say_lost_log(Path("/dev/full"))
    assert capfd.readouterr().err == "mpc-fl: the log /dev/full is not whole: No space left on device\n"


def test_a_log_holds_one_line_per_failure_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "party.log"
    party_log.set_up_log(path)

    def fail() -> None:
        raise MemoryError

    thread = party_log.threading.Thread(target=fail, name="reader")
    thread.start()
    thread.join()
    try:
        raise ValueError("a secret")
    except ValueError:
        logging.getLogger("library").exception("unexpected")
    text = path.read_text()
    assert "thread reader failed: this machine ran out of memory" in text and "ValueError at " in text
    assert "Traceback" not in text and "a secret" not in text
    with pytest.raises(MpcFlError, match=f"cannot write {path}/log: "):
        party_log.set_up_log(path / "log")


_NO_THREADS = """
import json, logging, multiprocessing, os, sys, threading
from mpc_fl.apps.runs.party_process import party_process
logging.basicConfig()  # as libraries do that are imported
def refuse(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
launcher, party = multiprocessing.Pipe()
values = {"federation": {"hospitals": int(sys.argv[1])}, "site": {"log": sys.argv[2]}}
launcher.send_bytes(json.dumps({"name": "hospital-0", "values": values}).encode())
if os.fork() == 0:
    party_process(party)
print(json.loads(launcher.recv_bytes())["error"], os.WEXITSTATUS(os.wait()[1]))
"""


@pytest.mark.parametrize(
    ("hospitals", "said"), [(3, "this machine ran out of processes or threads"), (-1, "federation.hospitals")]
)
def test_a_party_that_fails_before_its_log_is_there_leaves_the_word_to_the_launcher(
    hospitals: int, said: str, tmp_path: Path
) -> None:
    """On the old code three lines of a library's log for each party, beside the one of the command."""
    command = [sys.executable, "-c", _NO_THREADS, str(hospitals), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert said in done.stdout and done.stderr == "", (done.stdout, done.stderr)


def test_what_the_system_refuses_a_party_is_no_defect(tmp_path: Path) -> None:
    party_log.set_up_log(tmp_path / "party.log")
    for error in (
        OSError(28, "No space left on device", "/data/x"),
        MemoryError(),
        PermissionError(13, "Permission denied"),
    ):
        found = unforeseen(error)
        assert "defect" not in str(found) and "\n" not in str(found)
    assert "(a defect; see the log)" in str(unforeseen(ZeroDivisionError()))


# ---- directories of runs -----------------------------------------------------------------------------------------------


def test_a_run_that_can_go_on_says_so(tmp_path: Path) -> None:
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    partial.mkdir()
    with pytest.raises(ConfigError, match="another run is using it; remove it if that one is dead"):
        require_free(out)
    (partial / "parties" / "aggregator").mkdir(parents=True)
    (partial / "parties" / "aggregator" / "checkpoint-1.safetensors").touch()
    with pytest.raises(ConfigError, match="go on with it with --resume, or remove it, if that one is dead"):
        require_free(out)
    require_free(out, resume=True)


def test_a_diagnosis_that_failed_after_its_results_keeps_them(tmp_path: Path) -> None:
    with pytest.raises(MpcFlError), run_directory(tmp_path / "run") as directory:
        hospital = directory / "parties" / "hospital-0"
        hospital.mkdir(parents=True)
        (hospital / "results.jsonl").write_text("{}\n")
        raise MpcFlError("the disk is full")
    kept = [path.name for path in (tmp_path / "run.failed").rglob("*") if path.is_file()]
    assert kept == ["results.jsonl"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_lost_party_was_writing_is_removed_with_its_journal(fails: bool, tmp_path: Path) -> None:
    """A hospital that was killed while it made its privacy ledger left a journal, in the finished run, too."""
    with contextlib.suppress(MpcFlError), run_directory(tmp_path / "run") as directory:
        for name in ("hospital-0/.hospital-0-privacy.sqlite3.x.partial", "aggregator/checkpoint-1.safetensors"):
            (directory / "parties" / name).parent.mkdir(parents=True)
            (directory / "parties" / name).touch()
        (directory / "parties" / "hospital-0" / ".hospital-0-privacy.sqlite3.x.partial-journal").touch()
        if fails:
            raise MpcFlError("a hospital was killed")
    kept = [path.name for path in (tmp_path / ("run.failed" if fails else "run")).rglob("*") if path.is_file()]
    assert kept == ["checkpoint-1.safetensors"]


@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_place_that_is_taken_is_refused_before_anything_is_read(config: Path, tmp_path: Path, command: str) -> None:
    """The data do not exist either; on the old code that was what was told."""
    nothing = tmp_path / "nothing"
    more = ["--data", nothing] if command == "train" else ["--model", nothing, "--images", nothing]
    done = mpc_fl(command, config, "--set", "data.source=images", *more, "--out", tmp_path)
    assert done.returncode == ConfigError.exit_code and complaint(done).startswith(f"mpc-fl: {tmp_path} exists already")
