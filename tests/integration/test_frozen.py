"""A party that is stopped (SIGSTOP) and whose machine still acknowledges what it is sent: everybody names it, within the time that
docs/protocols/links.md gives; once it goes on it blames nobody else. Without a launcher, as sites run.

The victim stops itself on entering a phase, so the fault strikes where the test says. `receive_timeout` is far above what is
waited here: without signs of life a test would fail by its own deadline.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.config.config import Config, parse_config, party_names
from tests.support import served
from tests.support.frozen import Sites, await_stopped

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 2, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
    "privacy": {"mechanism": "none"},
    "inference": {"limit": 2},
    "runtime": {"connect_timeout": 120.0, "receive_timeout": 400.0},
}
EVERY_TIME = {("train", "hospital-1", "round 1 training"), ("infer fast", "dealer", "offline")}  # the others are `long`
MATRIX = [
    *[("train", "hospital-1", phase) for phase in ("distribution", "round 1 training", "round 2 evaluation")],
    *[("train", "aggregator", phase) for phase in ("distribution", "round 1 aggregation", "conclusion")],
    *[("infer", name, "sharing weights") for name in ("hospital-0", "model-owner")],
    *[("infer", "dealer", "correlated randomness"), ("infer", "hospital-0", "image 2")],
    *[("infer fast", name, "online") for name in ("hospital-0", "model-owner")],
    ("infer fast", "dealer", "offline"),
]


def configuration(task: str, **changes: dict[str, Any]) -> Config:
    values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
    return parse_config({**values, "task": task}, "test")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both engines, by the name of the task."""
    from mpc_fl.federation.global_model import initial_model
    from mpc_fl.learning.models.model_file import save_model

    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "infer", initial_model(configuration("infer")), configuration("infer"))
    served.make_service_directory(directory, served.configuration())
    (directory / "model.safetensors").rename(directory / "infer fast")
    return directory


@pytest.mark.parametrize(
    ("task", "victim", "phase"),
    [pytest.param(*case, marks=() if case in EVERY_TIME else pytest.mark.long) for case in MATRIX],
)
def test_everybody_names_a_frozen_party(task: str, victim: str, phase: str, models: Path, tmp_path: Path) -> None:
    if task == "infer fast":
        runtime = {**SETTINGS["runtime"], "silence_timeout": 20.0}
        config = served.configuration().with_values(task="infer", inference={"limit": 2}, runtime=runtime)
    else:
        config = configuration(task)
    if task != "train":
        config = config.with_values(site={"model": str(models / task)})
    with Sites(config, tmp_path, victim, phase) as sites:
        sites.await_stopped()
        others = [name for name in party_names(config) if name != victim]
        said = sites.await_words(len(others))
        for name in others:
            assert f"{victim} has given no sign of life for 20 s in phase" in said[name], f"{name} said: {said[name]}"
            assert said[name].count("\n") == 0
        sites.send(victim, signal.SIGCONT)
        said = sites.await_words(1)
    names_itself(victim, said[victim], may_finish=phase == "conclusion")


def names_itself(victim: str, said: str, may_finish: bool = False) -> None:
    """What a party says that was given up and went on: at the conclusion its own results are there."""
    named = f"{victim} has given no sign of life" in said or said.startswith(f"{victim} itself stood still")
    assert named or (may_finish and said == "finished"), said


def test_a_frozen_hospital_is_left_out_where_there_is_a_quorum(tmp_path: Path) -> None:
    config = configuration("train", federation={"quorum": 2})
    with Sites(config, tmp_path, "hospital-1", "round 1 training") as sites:
        sites.await_stopped()
        assert set(sites.await_words(3).values()) == {"finished"}
        sites.send("hospital-1", signal.SIGCONT)
        names_itself("hospital-1", sites.await_words(1)["hospital-1"])
    assert (tmp_path / "parties" / "aggregator" / "model.safetensors").exists()


@pytest.mark.long
def test_a_frozen_aggregator_ends_a_run_with_a_quorum_and_blames_no_hospital(tmp_path: Path) -> None:
    config = configuration("train", federation={"quorum": 2})
    with Sites(config, tmp_path, "aggregator", "round 1 aggregation") as sites:
        sites.await_stopped()
        said = sites.await_words(3)
        assert all("aggregator has given no sign of life for 20 s" in words for words in said.values()), said
        sites.send("aggregator", signal.SIGCONT)
        names_itself("aggregator", sites.await_words(1)["aggregator"])


@pytest.mark.parametrize("victim", ["hospital-1", pytest.param("aggregator", marks=pytest.mark.long)])
def test_a_short_stop_harms_nobody(victim: str, tmp_path: Path) -> None:
    with Sites(configuration("train"), tmp_path, victim, "round 1 aggregation") as sites:
        sites.await_stopped()
        time.sleep(5.0)  # of the 20 after which it would be given up
        sites.send(victim, signal.SIGCONT)
        assert set(sites.await_words(4).values()) == {"finished"}


@pytest.mark.long
def test_when_all_stand_still_nobody_is_blamed(tmp_path: Path) -> None:
    """A machine that sleeps, or Ctrl-Z: all parties stop for longer than silence may last, and even than `receive_timeout`."""
    config = configuration("train", runtime={"receive_timeout": 40.0})
    with Sites(config, tmp_path, "hospital-1", "round 1 aggregation") as sites:
        sites.await_stopped()
        for name in party_names(config):
            sites.send(name, signal.SIGSTOP)
        time.sleep(50.0)
        for name in party_names(config):
            sites.send(name, signal.SIGCONT)
        assert set(sites.await_words(4).values()) == {"finished"}


@pytest.mark.long
@pytest.mark.parametrize("victim", ["dealer", "model-owner", "hospital-0"])
def test_a_frozen_party_of_a_service_is_named(victim: str, tmp_path: Path) -> None:
    """The session ends; a hospital that hangs costs another one its turn no longer."""
    config = served.configuration().with_values(runtime={"silence_timeout": 20.0, "receive_timeout": 400.0})
    served.make_service_directory(tmp_path, config)
    service = served.Service(tmp_path, config, {"turns": 1, "patience": 600.0, "deadline": 600.0})
    try:
        asking = service.begin("hospital-0", 2, "frozen", trigger=("masked 0", signal.SIGSTOP))
        assert service.before.get(timeout=60) == ("hospital-0", "about to stop")
        await_stopped(asking)
        if victim == "hospital-0":
            line, results = service.ask("hospital-1", 2, "unharmed")
            assert (line, len(results)) == ("", 2)
        else:
            os.kill(next(process.pid for process in service.servers if process.name == victim), signal.SIGSTOP)
        os.kill(asking.pid, signal.SIGCONT)
        name, line = service.told.get(timeout=120)
        assert name == "hospital-0" and f"{victim} has given no sign of life for 20 s" in line, line
    finally:
        for process in [*service.servers, *service.asking]:
            process.kill()
