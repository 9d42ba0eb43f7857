"""kill -9 of each role in each phase, as sites run it (no launcher): everybody else ends in time and names the victim.

Every party is a real process that runs its real program. The victim kills itself with SIGKILL at the moment it enters the
phase, so the fault always strikes where the test says. The whole matrix is marked `slow`; CI runs it after `make test`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.config.config import Config, parse_config, party_names
from tests.support.deviating import run_and_report
from tests.support.harness import SPAWN

pytestmark = pytest.mark.processes
CONNECT_TIMEOUT, RECEIVE_TIMEOUT = 20.0, 20.0
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 2, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
    "privacy": {"delta": 1e-3},
    "inference": {"limit": 2},
    "runtime": {"connect_timeout": CONNECT_TIMEOUT, "receive_timeout": RECEIVE_TIMEOUT},
}
HOSPITAL_PHASES = ["distribution", "round 1 training", "round 1 aggregation", "round 2 evaluation"]
MATRIX = [
    *[("train", "hospital-1", phase) for phase in HOSPITAL_PHASES],
    *[("train", "aggregator", phase) for phase in ("distribution", "round 1 aggregation", "round 2 evaluation")],
    *[("infer", "hospital-0", phase) for phase in ("sharing weights", "image 1", "image 2")],
    *[("infer", "model-owner", phase) for phase in ("sharing weights", "batch 1", "batch 2")],
    ("infer", "dealer", "correlated randomness"),
    *[("train", name, "connect") for name in ("hospital-1", "aggregator")],
    *[("infer", name, "connect") for name in ("hospital-0", "model-owner", "dealer")],
]
IN_EVERY_TEST_RUN = {("train", "hospital-1", "round 1 aggregation"), ("infer", "dealer", "correlated randomness")}


def _run_party(name: str, values: dict[str, Any], victim: str, phase: str, results: Any) -> None:
    """One party as its site runs it; the victim dies by SIGKILL on entering `phase`."""
    from mpc_fl.apps.runs.party_process import set_up_log
    from mpc_fl.links.links import Links

    config = parse_config(values, name)
    if name == victim and phase == "connect":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == victim:
        enter_phase = Links.set_phase

        def die_in_phase(links: Links, entered: str) -> None:
            enter_phase(links, entered)
            if entered == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        Links.set_phase = die_in_phase  # type: ignore[method-assign]
    set_up_log(config.site.log)
    run_and_report(name, config, results)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mpc_fl.federation.global_model import initial_model
    from mpc_fl.learning.models.model_file import save_model

    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = parse_config(SETTINGS, "test")
    save_model(path, initial_model(config), config)
    return path


@pytest.mark.parametrize(
    ("task", "victim", "phase"),
    [pytest.param(*case, marks=() if case in IN_EVERY_TEST_RUN else pytest.mark.slow) for case in MATRIX],
)
def test_kill_9_ends_the_others_in_time(task: str, victim: str, phase: str, model: Path, tmp_path: Path) -> None:
    from mpc_fl.apps.runs.local_parties import place_parties

    # Who is there comes in time also on a busy machine; the deadline matters where somebody is not.
    runtime = {**SETTINGS["runtime"], "connect_timeout": CONNECT_TIMEOUT if phase == "connect" else 85.0}
    site = {"model": str(model)} if task == "infer" else {}
    config: Config = parse_config({**SETTINGS, "task": task, "runtime": runtime, "site": site}, "test")
    placed = place_parties(config, tmp_path)
    results = SPAWN.Queue()
    processes = {
        name: SPAWN.Process(
            target=_run_party, args=(name, c.model_dump(mode="json"), victim, phase, results), name=name
        )
        for name, c in placed.items()
    }
    for process in processes.values():
        process.start()
    survivors = [name for name in party_names(config) if name != victim]
    try:
        processes[victim].join(timeout=90)
        assert processes[victim].exitcode == -signal.SIGKILL, "the victim never came to that phase"
        died = time.monotonic()
        messages: dict[str, str] = {}
        for _ in survivors:
            name, message = results.get(timeout=max(CONNECT_TIMEOUT, RECEIVE_TIMEOUT) + 30)
            messages[name] = message
        for name in survivors:
            processes[name].join(timeout=20)
            assert processes[name].exitcode not in (None, 0), f"{name} did not fail: {messages[name]}"
        assert time.monotonic() - died < max(CONNECT_TIMEOUT, RECEIVE_TIMEOUT) + 30
    finally:
        for process in processes.values():
            if process.is_alive():
                process.kill()
            process.join()
    for name in survivors:
        assert victim in messages[name], f"{name} said: {messages[name]}"
        assert "\n" not in messages[name]
        if phase == "connect":
            assert "did not connect within" in messages[name] or "stopped" in messages[name], messages[name]
    half_written = [
        path
        for path in tmp_path.rglob("*")
        if path.suffix in (".partial", ".new") or ".partial" in path.name or path.name == "model.safetensors"
    ]
    assert not half_written
    for record in tmp_path.rglob("*.jsonl"):
        assert record.read_text().endswith("\n") or not record.read_text()


def test_the_matrix_covers_every_role() -> None:
    names = {(task, victim.split("-")[0] if victim.startswith("hospital") else victim) for task, victim, _ in MATRIX}
    assert names == {("train", "hospital"), ("train", "aggregator"), ("infer", "hospital"), ("infer", "model-owner"),
                     ("infer", "dealer")}  # fmt: skip
