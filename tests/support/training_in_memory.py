"""Whole training runs in one process: each party a thread that runs its program, over links in memory, in virtual time.

Everything is the product's but what carries the bytes and CrypTen's runtime, which replaces globals of the process: training
does without it. A test can let a party sleep before its k-th message leaves, for a while or for good.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.apps.runs.local_parties import place_parties
from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.federation import aggregator_program, hospital_program, peer_program
from mpc_fl.files import read_json_lines
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import DroppedError, InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import timeouts_of, tolerance_of
from mpc_fl.roles import AGGREGATOR, split_name
from mpc_fl.sharing.opening import SecretDomain
from tests.support.virtual_time import REAL_SECONDS, Clock, keep_virtual_time

FOR_GOOD, KILLED = math.inf, 0.0
LATENCY = (
    0.001  # seconds that each message takes, so that who waits for an answer has begun before whoever waits for others
)
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 30, "test_patients": 12}},
    "model": {"architecture": "mlp", "hidden": [2]},
    "training": {"rounds": 2, "local_steps": 1, "batch_size": 8, "per_sample_gradients": "vmap"},
    "privacy": {"mechanism": "none"},
    "federation": {"quorum": 2},
    "runtime": {"connect_timeout": 60.0, "receive_timeout": 20.0},
}


@dataclass
class Sleeper:
    """A party that sleeps for so many seconds before a message of its own leaves: its first of this tag, after `heard` others of
    that tag, or number `at`.

    `KILLED` ends it there instead. `slept` says that it came to it, `since` when.
    """

    name: str
    at: str | int
    seconds: float = FOR_GOOD
    heard: int = 0
    sent: int = 0
    slept: bool = False
    since: float = 0.0
    awake: threading.Event = field(default_factory=threading.Event)

    def falls_asleep(self, tag: str) -> bool:
        """Whether it does so now, before it sends something of this tag."""
        is_there = not self.slept and (tag.startswith(self.at) if isinstance(self.at, str) else self.sent == self.at)
        asleep = is_there and self.heard == 0
        self.heard -= int(is_there and not asleep)
        self.sent += 1
        self.slept = self.slept or asleep
        return asleep


class _NoRuntime:
    """What training needs of a runtime: a secret domain."""

    def __init__(self, links: Links, config: Config) -> None:
        self._links, self._world = links, [n for n in party_names(config) if n == links.name or links.alive(n)]

    def domain(self, record: Any, signatory: Signatory) -> SecretDomain:
        return SecretDomain(self._links, self._world, record, signatory=signatory)


@contextlib.contextmanager
def without_runtime(links: Links, config: Config) -> Iterator[_NoRuntime]:
    """In place of CrypTen's (`planning.training_runtime`)."""
    yield _NoRuntime(links, config)


class Training:
    """One run; `said` is how each party ended, `ended` when, `log` what all of them logged, `sent` who sent what, by tags.

    `never` is what a party waits for that a deviation keeps silent for good."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> None:
        values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
        self.config = parse_config(values, "test")
        self.directory = directory
        self.placed = place_parties(self.config, directory)
        self.clock: Clock = keep_virtual_time(monkeypatch)
        self.said: dict[str, str] = {}
        self.ended: dict[str, float] = {}
        self.log: list[str] = []
        self.sent: list[tuple[str, str]] = []
        self.never = threading.Event()
        self.start_anew()
        for program in (aggregator_program, hospital_program):
            monkeypatch.setattr(program, "connect", self._links)
            monkeypatch.setattr(program, "training_runtime", without_runtime)
        monkeypatch.setattr(peer_program, "connect", self._links)

    def start_anew(self) -> None:
        """Fresh links between all parties, as when they are started again."""
        agreement = Agreement("session", self.config.digest(), "train")
        self.network = InMemoryNetwork(party_names(self.config), agreement, timeouts_of(self.config, AGGREGATOR))
        self.said.clear()

    def _links(self, config: Config, name: str, _observer: Any, _code: str = "") -> Links:
        return self.network.links(name, tolerance_of(config), timeouts=timeouts_of(config, name))

    def _party(self, name: str, starts: Sequence[threading.Event]) -> None:
        """The whole of a party, which begins when the first of `starts` is set, and again, after it was lost, with each other."""
        with self.clock.entered():
            for count, start in enumerate(starts):
                if count:
                    self.placed[name] = self.placed[name].with_values(site={"resume": True})
                if not start.is_set():
                    self.clock.wait(start, math.inf)
                self._once(name)

    def _once(self, name: str) -> None:
        try:
            if name == AGGREGATOR:
                aggregator_program.run(self.placed[name], lambda *_: None)
            else:
                program = peer_program if self.config.among_peers else hospital_program
                program.run(self.placed[name], split_name(name)[1], lambda *_: None)
            self.said[name] = "finished"
        except DroppedError:
            self.said[name] = "dropped"
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.said[name] = f"{type(error).__name__}: {error}"
        self.ended[name] = self.clock.monotonic()

    def run(
        self,
        *sleepers: Sleeper,
        training: Mapping[str, float] | None = None,
        silent: Collection[str] = (),
        late: Mapping[str, str] | None = None,
        again: Mapping[str, str] | None = None,
    ) -> None:
        """Run all parties until all but those that sleep for good, or are `silent`, have ended; then these are gone as if killed.

        `training`: seconds that hospitals take for their updates. `late`: who starts only when somebody sends a message of this
        tag; `again`: who starts again, with --resume, when that happens after it has ended.
        """
        late, again = dict(late or {}), dict(again or {})
        started = {name: threading.Event() for name in late}
        restarted = {name: threading.Event() for name in again}

        def watch(sender: str, _receiver: str, frame: Frame) -> None:
            self.clock.let_pass(LATENCY)
            if frame.kind not in (Kind.TENSOR, Kind.OBJECT):
                return
            self.sent.append((sender, frame.tag))
            for name in [name for name, tag in late.items() if frame.tag.startswith(tag)]:
                late.pop(name)
                self.clock.wake(started[name])
            for name in [name for name, tag in again.items() if name in self.said and frame.tag.startswith(tag)]:
                again.pop(name)
                self.clock.wake(restarted[name])
            if frame.tag.startswith(("ready update", "ready gradient")) and sender in (training or {}):
                self.clock.wait(threading.Event(), (training or {})[sender])
            for sleeper in sleepers:
                if sleeper.name == sender and sleeper.falls_asleep(frame.tag):
                    sleeper.since = self.clock.monotonic()
                    if sleeper.seconds == KILLED:
                        self.network.drop(sender)
                    else:
                        self.clock.wait(sleeper.awake, sleeper.seconds)

        self.network.watch(watch)
        handler = logging.Handler()
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("mpc_fl")
        logger.addHandler(handler)
        torch.set_num_threads(1)
        at_once = threading.Event()
        at_once.set()
        threads = {
            name: threading.Thread(
                target=self._party,
                args=(name, [started.get(name, at_once), *([restarted[name]] if name in restarted else [])]),
                name=name,
                daemon=True,
            )
            for name in self.placed
        }
        self.clock.expect(len(threads))
        for thread in threads.values():
            thread.start()
        try:
            for_good = {sleeper.name: sleeper.awake for sleeper in sleepers if sleeper.seconds == FOR_GOOD}
            for_good |= dict.fromkeys(silent, self.never)
            for name in [*(name for name in threads if name not in for_good), *for_good]:
                if name in for_good:
                    self.network.drop(name)
                    self.clock.wake(for_good[name])
                threads[name].join(REAL_SECONDS)
                assert not threads[name].is_alive(), f"{name} did not end; so far {self.said}"
        finally:
            logger.removeHandler(handler)

    def party(self, name: str) -> Path:
        return self.directory / "parties" / name

    @property
    def rounds(self) -> dict[int, list[str]]:
        """The hospitals of each round, as the aggregator wrote them."""
        return {line["round"]: line["hospitals"] for line in read_json_lines(self.party(AGGREGATOR) / "metrics.jsonl")}
