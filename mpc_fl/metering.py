"""What this process spends: time by the clock, of processors and of a GPU, and energy where the machine measures it.

Processor seconds are those of all threads of this process and of the processes that it started. GPU seconds are those in which
its GPU worked on what it was given, between kernels included (`on_gpu`). Joules are a share of what the machine measures
(`package_energy`), else an estimate from seconds, which is no measurement and says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.package_energy import PackageEnergy, busy_seconds, package_energy, share_of

_JOULES_PER_KWH = 3.6e6
_OF_PROCESS = slice(
    11, 15
)  # user and system time, its own and its ended children's, behind the name in /proc/<pid>/stat


@dataclass(frozen=True)
class Spent:
    """Of one phase. `processor_joules` is None where they are not measured, `gpu_seconds` 0 without a GPU."""

    seconds: float
    processor_seconds: float
    gpu_seconds: float
    processor_joules: float | None

    def __add__(self, other: Spent) -> Spent:
        both = (self.processor_joules, other.processor_joules)
        return Spent(
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            self.gpu_seconds + other.gpu_seconds,
            None if both[0] is None or both[1] is None else both[0] + both[1],
        )


@dataclass(frozen=True)
class _OfMachine:
    """Joules of all packages, and seconds that all processors have worked."""

    joules: float
    busy: float


@dataclass(frozen=True)
class _Reading:
    seconds: float
    processor: float
    gpu: float
    machine: _OfMachine | None


class Meter:
    """Reads what this process has spent, from one call of `lap` to the next. One thread at a time."""

    def __init__(self, energy: PackageEnergy | None) -> None:
        self._energy = energy
        self._last = self._read()

    def lap(self) -> Spent:
        """What was spent since the last call."""
        last, now = self._last, self._read(self._last.processor)
        self._last = now
        own, share = now.processor - last.processor, None
        if now.machine is not None and last.machine is not None:
            share = share_of(now.machine.joules - last.machine.joules, own, now.machine.busy - last.machine.busy)
        return Spent(now.seconds - last.seconds, own, now.gpu - last.gpu, share)

    def _read(self, before: float = 0.0) -> _Reading:
        processor = max(before, processor_seconds())  # of a process that ends some ticks may be missing for a moment
        return _Reading(time.monotonic(), processor, _gpu.seconds, self._of_machine())

    def _of_machine(self) -> _OfMachine | None:
        joules = None if self._energy is None else self._energy.joules()
        busy = None if joules is None else busy_seconds(ticks=os.sysconf("SC_CLK_TCK"))
        return None if joules is None or busy is None else _OfMachine(joules, busy)


def meter() -> Meter:
    """One that begins now, with the counters of this machine where they can be read."""
    return Meter(package_energy())


def processor_seconds() -> float:
    """Of this process and its threads, of the processes that it started and that have ended, and of those at work."""
    at_work = multiprocessing.active_children()  # first: it has the system count the others among those that ended
    working = sum(_of_process(child.pid) for child in at_work)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + working


def _of_process(number: int | None) -> float:
    """Of a process that is at work; 0 where the system does not show it, until it has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        behind = text.rpartition(")")[2].split()
        return sum(map(int, behind[_OF_PROCESS])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


class _GpuSeconds(threading.local):
    """Of this thread: in a process of its own a party trains in one thread, which sets its phases as well."""

    seconds = 0.0
    counts = False


_gpu = _GpuSeconds()


@contextlib.contextmanager
def on_gpu(wait: Callable[[], None]) -> Iterator[None]:
    """Count the block as GPU seconds of this thread; `wait` returns when the GPU has done what it was given. Within another such
    block it is that one's."""
    if _gpu.counts:
        yield
        return
    began, _gpu.counts = time.perf_counter(), True
    try:
        yield
        wait()
    finally:
        _gpu.counts = False
        _gpu.seconds += time.perf_counter() - began


def joules_of(spent: Spent, measured: bool, watts_per_core: float, watts_per_gpu: float) -> float:
    """Joules of a phase: of its processors as measured, or of busy cores as estimated; of its GPU always as estimated."""
    processors = spent.processor_seconds * watts_per_core
    if measured:
        assert spent.processor_joules is not None
        processors = spent.processor_joules
    return processors + spent.gpu_seconds * watts_per_gpu


def grams_of(joules: float, grid_intensity: float) -> float:
    """Grams of CO2 equivalent of so many joules from a grid of so many grams per kWh."""
    return joules / _JOULES_PER_KWH * grid_intensity
