"""Local training in several processes: the same round as in one, noise once, and every failure named and cleaned up.

All processes are real. Signals strike inside a forward pass or between two steps, never after a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.training import batch_pieces
from mpc_fl.learning.training.dp_sgd import LocalRound, LocalTraining, train_locally
from mpc_fl.learning.training.per_sample_gradients import clipped_sum, sum_cross_entropy, working_copy
from mpc_fl.learning.training.process_group import TrainingGroup, TrainingProcessError, training_group

pytestmark = pytest.mark.processes
torch.set_num_threads(1)
KEY = bytes(range(32))
SHAPE = (1, 8, 8)
PATIENTS = 9


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def records() -> Records:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(2 * PATIENTS, *SHAPE, generator=generator) + 0.1
    labels = torch.randint(0, 3, (2 * PATIENTS,), generator=generator)
    return Records(inputs, labels, list(torch.arange(2 * PATIENTS).split(2)))


def configured(mechanism: str, processes: int = 3, steps: int = 4) -> Config:
    return Config().with_values(
        data={"image_size": 8},
        training={"local_steps": steps, "per_sample_gradients": "loop", "learning_rate": 0.05},
        privacy={"mechanism": mechanism},
        site={"training_processes": processes},
    )


def convolutional() -> nn.Module:
    """A network with frozen statistics, which the processes must take over with the weights."""
    model = build_model(configured("local"), input_shape=SHAPE, seed=3)
    calibrate_batchnorm(model, records().inputs * 3 + 1)
    return model


def trained(
    model: nn.Module, mechanism: str, number: int, group: TrainingGroup | None, rate: float = 0.5, **options: Any
) -> LocalRound:
    noise = None if mechanism == "none" else options.pop("noise_multiplier", 1.0)
    training = LocalTraining(configured(mechanism), noise, rate, 7, options.pop("method", None), group)
    return train_locally(model, records(), training, number, Seed(KEY), **options)


def others(group: TrainingGroup | None) -> list[psutil.Process]:
    assert group is not None
    return [psutil.Process(member.process.pid) for member in group._members]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=30)[1]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingGroup]:
    """Three processes of one hospital, for the convolutional network; what they left in files was checked."""
    directory = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(directory))
        group = TrainingGroup(convolutional(), 3, start_timeout=120, step_timeout=120)
    try:
        assert not list(directory.iterdir())
        yield group
    finally:
        group.close()


# --- the same mathematics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["local", "none"])
def test_three_processes_train_like_one(three: TrainingGroup, mechanism: str) -> None:
    model, generator = convolutional(), torch.Generator().manual_seed(5)
    for number in (1, 2):  # the second round finds the processes as the first one left them
        alone, shared = trained(model, mechanism, number, None), trained(model, mechanism, number, three)
        largest = float(alone.update.abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(shared.update, alone.update, rtol=0, atol=1e-5 * largest)
        assert (shared.event, shared.records_used) == (alone.event, alone.records_used)
        assert shared.clipped_fraction == alone.clipped_fraction
        assert shared.mean_loss == pytest.approx(alone.mean_loss, rel=1e-5)
        for parameter in model.parameters():  # another network: the weights must travel anew
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def test_noise_is_added_once_and_is_that_of_one_process(three: TrainingGroup) -> None:
    """Without a patient the update is noise alone, bit for bit; a second helping from anywhere would show."""
    model = convolutional()
    alone, shared = (trained(model, "local", 1, group, rate=1e-12) for group in (None, three))
    assert alone.records_used == 0 and float(alone.update.abs().min()) > 0
    assert torch.equal(shared.update, alone.update)
    loud = [trained(model, "local", 1, group, noise_multiplier=1e4).update.double() for group in (None, three)]
    assert float((loud[0] - loud[1]).norm() / loud[0].norm()) < 1e-6


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_records_are_clipped_one_by_one_however_few(three: TrainingGroup, count: int) -> None:
    model, data = working_copy(convolutional()), records()
    inputs, labels = data.inputs[:count] * 10, data.labels[:count]
    three.begin_round(model, private=True)
    alone = clipped_sum(model, sum_cross_entropy, inputs, labels, 0.01)
    shared = three.clipped_sum(model, inputs, labels, 0.01, "loop")
    for one, other in zip(shared.gradients, alone.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    torch.testing.assert_close(shared.norms, alone.norms)
    torch.testing.assert_close(shared.losses, alone.losses)
    assert bool((alone.norms > 0.01).all())
    if count == 0:
        return
    three.begin_round(model, private=False)
    loss = three.mean_gradient(model, inputs, labels)
    value = sum_cross_entropy(model(inputs), labels)
    parameters = list(model.parameters())
    for parameter, expected in zip(parameters, torch.autograd.grad(value / count, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)


@pytest.mark.parametrize("mechanism", ["local", "none"])
def test_recipes_are_the_same_in_three_processes(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmented, with weights of classes and clipping, and more records than one piece of the hospital's own process has."""
    recipe = {"augmentation": {"copies": 3, "flip": True, "shift": 0.1}, "class_weights": [1.0, 3.0, 0.5]}
    recipe |= {"gradient_clipping": 0.2} if mechanism == "none" else {}
    config, model = (
        configured(mechanism).with_values(training={**configured(mechanism).training.model_dump(), **recipe}),
        convolutional(),
    )
    monkeypatch.setattr(batch_pieces, "_RECORD_BYTES", 2 * 4 * 64)
    noise = None if mechanism == "none" else 1.0
    with training_group(config, model) as group:
        alone, shared = (
            train_locally(model, records(), LocalTraining(config, noise, 0.9, 7, None, members), 1, Seed(KEY))
            for members in (None, group)
        )
    largest = float(alone.update.abs().max())
    assert alone.records_used > 12 and largest > 1e-4
    torch.testing.assert_close(shared.update, alone.update, rtol=0, atol=1e-4 * largest)
    assert shared.mean_loss == pytest.approx(alone.mean_loss, rel=1e-5)


class WithUnusedLayer(nn.Module):
    """Holds parameters its output does not depend on, and branches, so that tracing cannot drop them."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 3), nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        return self.used(flat) if bool((inputs >= 0).all()) else self.used(flat)


@pytest.mark.slow
def test_parameters_without_a_gradient_do_no_harm_and_the_group_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "daemon", True)  # as the launcher starts a party
    model = WithUnusedLayer()
    with training_group(configured("none", 2), model) as group:
        processes = others(group)
        for mechanism in ("none", "local"):
            alone, shared = trained(model, mechanism, 1, None), trained(model, mechanism, 1, group)
            torch.testing.assert_close(shared.update, alone.update, rtol=0, atol=1e-6)
    assert gone(processes)
    with pytest.raises(TrainingProcessError, match="have ended"):
        trained(model, "local", 1, group)


def test_one_process_needs_no_group() -> None:
    with training_group(configured("local", 1), convolutional()) as group:
        assert group is None


# --- nothing is reachable or left behind ------------------------------------------------------------------------------


def test_all_sockets_are_on_the_loopback_address(three: TrainingGroup) -> None:
    connections = [c for process in others(three) for c in process.net_connections(kind="inet")]
    assert sum(c.status == psutil.CONN_LISTEN for c in connections) == 2
    assert {c.laddr.ip for c in connections} == {"127.0.0.1"}


def test_an_error_of_the_own_part_ends_all_and_stays_what_it_is() -> None:
    model = convolutional()
    with training_group(configured("local", 2), model) as group:
        processes = others(group)
        with pytest.raises(ModelError, match="Opacus's hooks cannot handle this model"):
            trained(model, "local", 1, group, method="hooks")
        assert gone(processes)


def test_ctrl_c_reaches_only_the_hospitals_own_process(three: TrainingGroup) -> None:
    for process in others(three):
        process.send_signal(signal.SIGINT)
    assert trained(convolutional(), "local", 3, three).steps == 4


# --- failures ---------------------------------------------------------------------------------------------------------


class Stricken(nn.Module):
    """In the last of `processes`, the forward pass on a record sends the process a signal, or (0) does not end."""

    def __init__(self, processes: int, strike: int) -> None:
        super().__init__()
        self.layer, self.victim, self.strike = nn.Linear(64, 3), f"local training process {processes - 1}", strike

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs != 0).any()) and multiprocessing.current_process().name == self.victim:
            print("struck", flush=True)
            os.kill(os.getpid(), self.strike)
            time.sleep(0 if self.strike else 600)
        return self.layer(inputs.flatten(1))


@pytest.mark.parametrize(
    ("mechanism", "processes", "strike"),
    [
        ("local", 2, signal.SIGKILL),
        pytest.param("none", 3, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("local", 3, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("none", 2, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_stops_within_a_step_is_named(
    mechanism: str, processes: int, strike: signal.Signals
) -> None:
    model = Stricken(processes, strike)
    group = TrainingGroup(model, processes, start_timeout=120, step_timeout=4 if strike == signal.SIGSTOP else 120)
    try:
        running = others(group)
        what = "was killed by signal 9" if strike == signal.SIGKILL else "is late: no answer within 4 s"
        with pytest.raises(
            TrainingProcessError, match=rf"^{model.victim} \(pid {running[-1].pid}\) {what}: "
        ) as caught:
            trained(model, mechanism, 1, group)
        assert "\n" not in str(caught.value)
        assert gone(running)
    finally:
        group.close()


def test_a_death_between_two_steps_is_found_at_the_next() -> None:
    model = convolutional()
    with training_group(configured("local", 2), model) as group:
        (victim,) = others(group)

        def strike(step: int, _steps: int) -> None:
            assert step == 1, "the round went on without the process"
            victim.kill()

        with pytest.raises(TrainingProcessError, match=r"process 1 \(pid \d+\) was killed by signal 9"):
            trained(model, "local", 1, group, progress=strike)


class Unloadable(nn.Linear):
    """Ends the process that unpickles it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unloadable:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return os._exit, (5,)


def test_a_process_that_cannot_start_is_named() -> None:
    with pytest.raises(TrainingProcessError, match=r"process 1 \(pid \d+\) ended with exit status 5"):
        with training_group(configured("local", 2), Unloadable(64, 3)):
            pass


HOSPITAL = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.learning.training.test_process_group import *
if __name__ == "__main__":
    model = Stricken(2, strike=0)
    group = TrainingGroup(model, 2, 120, 120)
    print(others(group)[0].pid, flush=True)
    trained(model, "local", 1, group)
"""


@pytest.mark.slow
def test_a_process_ends_with_its_killed_parent_though_it_computes(tmp_path: Path) -> None:
    """kill -9 of the hospital's own process while the other is within a forward pass that does not end."""
    script = tmp_path / "hospital.py"
    script.write_text(HOSPITAL)
    command = [sys.executable, str(script), str(Path(__file__).resolve().parents[3])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        assert process.ppid() == parent.pid
        assert parent.stdout.readline() == "struck\n"
        parent.kill()
        parent.wait()
        try:
            assert gone([process])
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
