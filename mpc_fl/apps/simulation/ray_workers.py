"""Groups of simulated hospitals as Ray actors, on this machine or on a cluster that is there already. Nothing else imports Ray.

Ray schedules: one actor for each processor that it has, or as many as are asked for. On this machine it is started for one run,
takes no order without a token that only this process and its own know, and tells nobody about its use. It ends with the run, and
with this process if that is killed.

Ray pickles what its own processes say to each other. So a cluster must be one whose machines and network the researcher trusts; no
hospital of a real federation is ever part of one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate

from mpc_fl.apps.runs.party_log import log_nowhere
from mpc_fl.apps.runs.party_process import quoting_nothing
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.workers import Done, Given, T
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, MpcFlError, RunFailedError, printable
from mpc_fl.exhaustion import exhaustion
from mpc_fl.files import OTHERS_MAY_NOTHING
from mpc_fl.roles import hospital_name

_LEAST_STORE, _MOST_STORE = 100 << 20, 2 << 30  # bytes; the least that Ray takes is 75 MB
_LARGEST_REASON = 200
_SHARED_MEMORY = Path("/dev/shm")
_STARTING = 300.0  # seconds until an actor has imported its libraries, on a machine with other things to do


@dataclass(frozen=True)
class Failure:
    """Why a group could not answer."""

    what: str
    fix: str


class _Actor:
    """One group in a process of its own. What it raises is said in two sentences: a traceback could quote data."""

    def __init__(self, values: dict[str, Any], ranks: Sequence[int]) -> None:
        import torch

        os.umask(OTHERS_MAY_NOTHING)
        log_nowhere()
        self._ledgers: tempfile.TemporaryDirectory[str] | None = None
        if values["site"]["out"] is None:  # on a machine of a cluster
            self._ledgers = _folder_for_ledgers()
            values["site"]["out"] = self._ledgers.name
        config = parse_config(values, "the configuration of the simulation")
        torch.set_num_threads(config.runtime.threads)
        self._group = HospitalGroup(config, ranks)

    def call(self, method: Callable[..., Any], *given: Any) -> Any:
        """The answer of a method of the group, or why there is none."""
        try:
            with quoting_nothing():
                return method(self._group, *given)
        except MpcFlError as error:
            return Failure(error.what, error.fix)

    def end(self) -> None:
        """Nothing is left of the group on its machine."""
        if self._ledgers is not None:
            self._ledgers.cleanup()


def _folder_for_ledgers() -> tempfile.TemporaryDirectory[str]:
    """For one run alone, so in memory where there is such a place: no disk need be waited for."""
    within = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="mpc-fl-", dir=within)


class RayWorkers:
    """`Workers` on Ray: `groups` are actors with the ranks of their hospitals, `seconds` the longest wait for one answer."""

    def __init__(self, groups: Sequence[tuple[Any, Sequence[int]]], seconds: float) -> None:
        self._groups, self._seconds = list(groups), seconds
        self._at_first = _STARTING

    def all(
        self, method: Callable[Concatenate[HospitalGroup, Given], T], *given: Given.args, **_named: Given.kwargs
    ) -> list[T]:
        """See `Workers`. Raises `RunFailedError`."""
        import ray

        held = [ray.put(value) for value in given]  # once for all groups
        asked = {actor.call.remote(method, *held): number for number, (actor, _) in enumerate(self._groups)}
        found = dict(self._answers(asked, [f"hospitals {_span(ranks)}" for _, ranks in self._groups]))
        return [found[number] for number in range(len(self._groups))]

    def each(self, method: Callable[..., None], done: Done, *given: object) -> None:
        """See `Workers`. Raises `RunFailedError` naming the hospital."""
        asked, names = dict[Any, int](), list[str]()
        for actor, ranks in self._groups:
            for rank in ranks:
                asked[actor.call.remote(method, rank, *given)] = len(names)
                names.append(hospital_name(rank))
        for count, _ in enumerate(self._answers(asked, names), 1):
            done(count, len(names))

    def _answers(self, asked: dict[Any, int], names: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """Each answer with the number of who was asked, as they come. Raises `RunFailedError`."""
        import ray

        waiting = list(asked)
        while waiting:
            seconds = max(self._seconds, self._at_first)
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=seconds)
            if not ready:
                late = names[asked[waiting[0]]]
                raise RunFailedError(
                    f"{late} did not answer within {seconds:g} s",
                    "raise federation.round_timeout, or give the simulation fewer workers than processors",
                )
            self._at_first = 0.0
            name = names[asked[ready[0]]]
            try:
                answer = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise RunFailedError(
                    f"the worker of {name} ended: {_reason(error)}",
                    "the system ends processes when memory runs out; simulate fewer hospitals, or take fewer --workers",
                ) from None
            if isinstance(answer, Failure):
                raise RunFailedError(f"{name} failed: {answer.what}", answer.fix)
            yield asked[ready[0]], answer

    def end(self) -> None:
        """Have each group remove what it keeps for the run; one that is gone has left nothing but a folder of its own."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([actor.end.remote() for actor, _ in self._groups], timeout=10.0)


def require_ray(workers: int | None = None, address: str | None = None) -> None:
    """Raise `ConfigError` where Ray is not installed, or this machine has fewer processors than workers."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ConfigError("a simulation needs Ray, which is not installed", "pip install 'mpc-fl[simulate]'")
    if address is None and (workers or 1) > processors_here():
        raise _too_few(workers or 1, "this machine", processors_here())


def processors_here() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def _too_few(workers: int, where: str, processors: int) -> ConfigError:
    return ConfigError(
        f"{workers} workers need a processor each, and {where} has {processors} to give", "take fewer --workers"
    )


@contextlib.contextmanager
def ray_workers(
    config: Config, values: dict[str, Any], workers: int | None, address: str | None
) -> Iterator[RayWorkers]:
    """All hospitals of `config` in `workers` groups, by default one for each processor that Ray has; it ends with the block.

    `values` are those of the configuration of each group, `address` that of a cluster that is there already; None starts Ray
    here. Raises `ConfigError` where it cannot be reached, or has fewer processors than workers.
    """
    seconds = config.federation.round_timeout or config.runtime.receive_timeout
    with _ray(address):
        import ray

        processors = int(ray.cluster_resources().get("CPU", 0))
        count = min(workers or processors, config.federation.hospitals)
        if not 1 <= count <= processors:
            raise _too_few(
                max(1, count), "this machine" if address is None else f"the Ray cluster at {address}", processors
            )
        actor = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        shares = [range(place, config.federation.hospitals, count) for place in range(count)]
        with contextlib.ExitStack() as kept:
            if address is None:
                values["site"]["out"] = kept.enter_context(_folder_for_ledgers())
            groups = RayWorkers([(actor.remote(values, list(ranks)), list(ranks)) for ranks in shares], seconds)
            if address is not None:
                kept.callback(groups.end)
            yield groups


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray as long as the block lasts: this process's own, or a cluster's. Raises `ConfigError` where there is none."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    folder = None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else it warns of a change to come
    # Else workers run at niceness 15, and stand still where others have something to do.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - a name of Ray
    if address is None:
        # Whoever may ask Ray for work runs programs as this user; on one machine that is this process alone.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        os.environ.pop("RAY_ADDRESS", None)
        # Else Ray takes an address of this machine for 127.0.0.1, and listens where others can reach it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        folder = tempfile.mkdtemp(prefix="mpc-fl-")  # short: names of sockets have an end
        quiet |= {
            "num_cpus": processors_here(),
            "include_dashboard": False,
            "object_store_memory": _store_bytes(),
            "_temp_dir": f"{folder}/r",  # Ray opens it to everybody, and nobody else may enter what it is in
            "_node_ip_address": "127.0.0.1",
        }
    import ray  # reads all of that when it is imported

    terminated = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address=address, **quiet)
            signal.signal(signal.SIGTERM, terminated)  # Ray would end this process without a word
        except Exception as error:  # noqa: BLE001 - Ray raises just that where it is not up in time
            if (exhausted := exhaustion(error)) is not None:
                raise exhausted from None
            where = "Ray cannot be started here" if address is None else f"there is no Ray cluster at {address}"
            fix = "start one with ray start --head, or leave out --address"
            if address is None:
                fix = "see its own words; if it took too long, try again when this machine has less to do"
            raise ConfigError(f"{where}: {_reason(error)}", fix) from None
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _store_bytes() -> int:
    """Of shared memory that Ray may fill with models and sums on their way; it takes what it needs of that."""
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
    return max(_LEAST_STORE, min(_MOST_STORE, free // 2))


def _reason(error: BaseException) -> str:
    """The first line of what Ray says."""
    lines = str(error).strip().splitlines()
    return printable(lines[0], _LARGEST_REASON) if lines else type(error).__name__


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
