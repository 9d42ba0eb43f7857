"""What a process spends: phases add up to the whole, children are counted once, and joules are said to be what they are."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mpc_fl.links.traffic import TrafficCounter
from mpc_fl.metering import Meter, Spent, grams_of, joules_of, on_gpu, processor_seconds
from mpc_fl.package_energy import STATISTICS, package_energy
from tests.test_package_energy import zone

WORK = 0.05  # seconds of a processor


def work(seconds: float = WORK) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_phases_add_up_to_the_whole() -> None:
    before = time.process_time()
    counter = TrafficCounter("a")
    for phase in ("b", "a", "closed"):
        work()
        counter.set_phase(phase)
    of = counter.spent
    assert list(of) == ["a", "b"] and of["a"].processor_seconds >= 2 * WORK and of["b"].processor_seconds >= WORK
    whole = of["a"] + of["b"]
    assert 3 * WORK <= whole.processor_seconds <= time.process_time() - before
    assert whole.seconds >= 0.0 and whole.gpu_seconds == 0.0


def _child(pipe: Connection) -> None:
    work(0.2)
    pipe.send(time.process_time())
    pipe.recv()


def test_a_process_that_was_started_counts_while_it_works_and_once_when_it_ended() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there,), daemon=True)
    process.start()
    before, own = processor_seconds(), time.process_time()
    assert here.poll(300)
    used = here.recv()
    if Path("/proc/self/stat").exists():
        assert processor_seconds() - before - (time.process_time() - own) > 0.15
    here.send("end")
    process.join(300)
    assert process.exitcode == 0
    children = processor_seconds() - before - (time.process_time() - own)
    assert 0.15 < children < 2 * used  # once: twice would be more, whatever it needed before and after


@pytest.mark.skipif(not STATISTICS.exists(), reason="this system does not say what its processors did")
def test_of_a_machine_that_measures_a_process_has_a_share(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = Meter(package_energy(tmp_path))
    work()
    file.write_text("5000000")
    spent = meter.lap()
    assert spent.processor_joules is not None and 0.0 < spent.processor_joules <= 5.0
    file.write_text("broken")
    assert meter.lap().processor_joules is None


def test_who_measures_nothing_says_so_and_estimates() -> None:
    meter = Meter(None)
    work()
    spent = meter.lap()
    assert spent.processor_joules is None
    assert joules_of(spent, False, 12.0, 200.0) == pytest.approx(12.0 * spent.processor_seconds)


def test_energy_is_that_of_processors_as_measured_and_of_a_gpu_as_estimated() -> None:
    one, other = Spent(10.0, 4.0, 0.0, 30.0), Spent(1.0, 1.0, 2.0, 5.0)
    assert joules_of(one, True, 12.0, 200.0) == 30.0
    assert joules_of(other, True, 12.0, 200.0) == 5.0 + 400.0
    assert joules_of(one + other, True, 12.0, 200.0) == 30.0 + 5.0 + 400.0
    assert joules_of(one + other, False, 12.0, 200.0) == 12.0 * 5.0 + 400.0
    assert (one + Spent(1.0, 1.0, 0.0, None)).processor_joules is None
    assert grams_of(3.6e6, 475.0) == pytest.approx(475.0)


def test_gpu_seconds_are_counted_until_its_work_is_done_and_once() -> None:
    meter, waited = Meter(None), list[str]()
    with on_gpu(lambda: waited.append("outer")), on_gpu(lambda: waited.append("inner")):
        work()
    first = meter.lap()
    assert waited == ["outer"] and first.gpu_seconds >= WORK
    assert meter.lap().gpu_seconds == 0.0
    with pytest.raises(ZeroDivisionError), on_gpu(lambda: waited.append("failed")):
        _ = 1 / 0
    with on_gpu(lambda: waited.append("next")):
        pass
    assert waited == ["outer", "next"]
