"""`mpc-fl simulate` as a command: on Ray's own processes, beside a real run, when it is killed, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mpc_fl.apps.simulation import ray_workers
from mpc_fl.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[3]
TIMEOUT = 280
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'mpc-fl[simulate]')"
)
TINY: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 120, "test_patients": 60}},
    "training": {"rounds": 2, "local_steps": 2, "batch_size": 8, "sampling_seed": 5},
    "privacy": {"mechanism": "none"},
    "federation": {"hospitals": 3},
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mpc_fl", *map(str, arguments)]


def mpc_fl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def written(directory: Path, **changes: dict[str, Any]) -> Path:
    """The tiny configuration with some values changed, as a file."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({**TINY, **{name: {**TINY.get(name, {}), **of} for name, of in changes.items()}}))
    return path


@needs_ray
@pytest.mark.slow
@pytest.mark.processes
def test_the_model_of_rays_processes_is_that_of_a_real_run_of_three(tmp_path: Path) -> None:
    config = written(tmp_path)
    real = mpc_fl("train", config, "--out", tmp_path / "real", "--json")
    assert real.returncode == 0, real.stderr
    done = mpc_fl("simulate", config, "--out", tmp_path / "simulated", "--workers", 1, "--json")
    assert done.returncode == 0, done.stderr
    theirs, own = (load_file(tmp_path / run / "model.safetensors") for run in ("real", "simulated"))
    assert set(theirs) == set(own) and all(torch.equal(value, own[name]) for name, value in theirs.items())
    expected, found = json.loads(real.stdout), json.loads(done.stdout)
    assert found["simulated"] and not expected["simulated"]
    for key in ("final", "privacy", "took_part", "parameters"):
        assert found[key] == expected[key], key


@needs_ray
@pytest.mark.slow
@pytest.mark.processes
def test_twenty_hospitals_train_with_noise_on_this_machine_alone_and_nothing_is_left_running(tmp_path: Path) -> None:
    config = written(tmp_path, privacy={"mechanism": "local", "epsilon": 8.0, "delta": 1e-3})
    process = subprocess.Popen(
        command("simulate", config, "--hospitals", 20, "--out", tmp_path / "out", "--json"),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = psutil.Process(process.pid)
    seen, listening = set[psutil.Process](), set[str]()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
            present = [started, *started.children(recursive=True)]
            seen.update(present[1:])
            for each in present:
                found = each.net_connections(kind="inet")
                listening |= {one.laddr.ip.removeprefix("::ffff:") for one in found if one.status == psutil.CONN_LISTEN}
        time.sleep(0.2)
    said, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    summary = json.loads(said)
    assert len(summary["privacy"]) == 20 and all(0 < line["epsilon"] <= 8 for line in summary["privacy"])
    assert seen and not any(each.is_running() for each in seen)
    assert listening and all(ipaddress.ip_address(each).is_loopback for each in listening), listening
    assert all(line.startswith("progress: ") for line in errors.splitlines()), errors


@needs_ray
@pytest.mark.slow
@pytest.mark.processes
def test_a_simulation_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    config = written(tmp_path, training={"rounds": 1000})
    log = tmp_path / "out.partial" / "metrics.jsonl"
    process = subprocess.Popen(
        command("simulate", config, "--workers", 1, "--out", tmp_path / "out"),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + TIMEOUT
    while not log.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    gone, alive = psutil.wait_procs(children, timeout=200)
    assert gone and not alive


@needs_ray
@pytest.mark.slow
@pytest.mark.processes
def test_a_hospital_that_fails_is_named_in_one_line(tmp_path: Path) -> None:
    config = written(tmp_path, federation={"hospitals": 3, "smallest_site": 41})
    done = mpc_fl("simulate", config, "--workers", 1, "--out", tmp_path / "out")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == DataError.exit_code, done.stderr
    assert last.startswith("mpc-fl: hospital-0 has fewer training patients"), done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^a simulation needs Ray, which is not installed: pip install 'mpc-fl\[simulate\]'$"
    ):
        ray_workers.require_ray()


@pytest.mark.parametrize("address", [None, "192.0.2.1:6379"])
def test_a_ray_that_does_not_start_is_said_in_one_line(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Ray gives up with an exception of no kind, which was a traceback for the user."""
    ray = pytest.importorskip("ray")

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    with (
        pytest.raises(ConfigError, match=r"current node timed out during startup\.: ") as caught,
        ray_workers._ray(address),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_more_workers_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ray_workers, "processors_here", lambda: 2)
    ray_workers.require_ray(2)
    ray_workers.require_ray(3, "192.0.2.1:6379")  # the cluster's processors are its own
    with pytest.raises(ConfigError, match="^3 workers need a processor each, and this machine has 2 to give"):
        ray_workers.require_ray(3)


def test_help_teaches_and_needs_no_ray() -> None:
    script = "import sys; sys.modules['ray'] = None; sys.argv = ['mpc-fl', 'simulate', '--help']\n"
    script += "from mpc_fl.apps.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--hospitals" in done.stdout and "mpc-fl simulate configs/demo.yaml" in done.stdout
