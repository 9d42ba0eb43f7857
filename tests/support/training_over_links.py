"""Training runs in one process over real links: each party a thread that runs its program, over mutual TLS.

Where who can be reached by whom matters, links in memory will not do. A hospital can be killed or frozen at a chosen frame.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.apps.runs.local_parties import place_parties
from mpc_fl.config.config import Config, parse_config
from mpc_fl.federation import aggregator_program, hospital_program, peer_program
from mpc_fl.links.connections import Connections
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.party_links import connect
from mpc_fl.roles import AGGREGATOR, split_name
from tests.support.training_in_memory import SETTINGS, without_runtime

LONGEST = 240.0  # seconds that a run may take here
_OF_KILLED = 20.0  # seconds for a killed party to find that it is
# `watcher(party, sender, frame)`: called of every frame that a party receives, on the thread that reads it.
Watcher = Callable[[str, str, Frame], None]


class KilledError(BaseException):
    """This party was killed: its thread ends, and no program may catch this."""


class TrainingOverLinks:
    """One run; `said` is how each party ended, `links` are theirs, `log` what all of them logged."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> None:
        runtime = {"connect_timeout": 60.0, "receive_timeout": 60.0, "silence_timeout": 20.0}
        values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
        values["runtime"] = runtime | changes.get("runtime", {})
        self.config: Config = parse_config({"task": "train", **values}, "test")
        self.directory = directory
        self.placed = place_parties(self.config, directory)
        self.said: dict[str, str] = {}
        self.links: dict[str, NetworkLinks] = {}
        self.watchers: list[Watcher] = []
        self.passes_no_greeting: set[str] = set()  # relays, so that links are made through the others
        self.log: list[str] = []
        self._thawed = dict[str, threading.Event]()

        def connected(config: Config, name: str, _observer: Any, code: str = "") -> Links:
            def observe(sender: str, frame: Frame) -> None:
                for watcher in self.watchers:
                    watcher(name, sender, frame)

            links = connect(config, name, observe, code)
            assert isinstance(links, NetworkLinks)
            self.links[name] = links
            if name in self.passes_no_greeting:
                links._connections._relay.pass_greeting_on = lambda *_: None  # type: ignore[method-assign]
            return links

        for program in (peer_program, hospital_program, aggregator_program):
            monkeypatch.setattr(program, "connect", connected)
        for program in (hospital_program, aggregator_program):
            monkeypatch.setattr(program, "training_runtime", without_runtime)

    def kill(self, name: str) -> None:
        """End a party as a killed process ends: its streams break, without a word, and it listens no more."""
        kill_links(self.links[name])

    def freeze(self, name: str) -> None:
        """Stop a party as SIGSTOP does: it reads and sends nothing, and its streams stay. `end_frozen` ends it at last."""
        thawed = self._thawed.setdefault(name, threading.Event())
        links = self.links[name]
        links._connections._pulse.stop()
        for peer in links._outgoing.peers.values():
            conversation = peer.conversation
            if conversation is not None:
                _stop(conversation, thawed)
        _stop_sending(links._outgoing, thawed)

    def end_frozen(self) -> None:
        """What was frozen is killed."""
        for name, thawed in self._thawed.items():
            self.kill(name)
            thawed.set()

    def run(self, **late: threading.Event) -> None:
        """Run all parties until all have ended, or what is frozen alone is left. `late` (with underscores) wait for their event."""
        handler = logging.Handler()
        handler.emit = self._note  # type: ignore[method-assign]
        logger = logging.getLogger("mpc_fl")
        logger.addHandler(handler)
        torch.set_num_threads(1)
        until = time.monotonic() + LONGEST
        threads = {
            name: threading.Thread(
                target=self._party, args=(name, late.get(name.replace("-", "_"))), name=name, daemon=True
            )
            for name in self.placed
        }
        for thread in threads.values():
            thread.start()
        try:
            for name, thread in threads.items():
                while thread.is_alive() and name not in self._thawed:  # which it may be yet
                    assert time.monotonic() < until, (name, self.said, self.log[-30:])
                    thread.join(0.5)
            self.end_frozen()
            # Of a killed process nothing would be left; a thread goes on until its wait has an end.
            for name, thread in threads.items():
                thread.join(_OF_KILLED if name in self._thawed else LONGEST)
        finally:
            logger.removeHandler(handler)

    def _note(self, record: logging.LogRecord) -> None:
        """What a killed party says when what kept it is let go, it would never have said."""
        thawed = self._thawed.get(str(record.threadName))
        if thawed is None or not thawed.is_set():
            self.log.append(record.getMessage())

    def _party(self, name: str, start: threading.Event | None) -> None:
        try:
            assert start is None or start.wait(LONGEST)
            if name == AGGREGATOR:
                aggregator_program.run(self.placed[name], lambda *_: None)
            else:
                program = peer_program if self.config.among_peers else hospital_program
                program.run(self.placed[name], split_name(name)[1], lambda *_: None)
            self.said[name] = "finished"
        except KilledError:
            self.said[name] = "killed"
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.said[name] = f"{type(error).__name__}: {error}"

    def party(self, name: str) -> Path:
        return self.directory / "parties" / name


def kill_links(links: NetworkLinks) -> None:
    """End a party's links as a killed process ends them: its waits end with `KilledError`."""
    links._mailboxes.interrupt(KilledError())
    _break(links._connections)


def _break(connections: Connections) -> None:
    """End all streams at once, and say nothing on any of them any more."""
    connections._mailboxes.close()
    connections._pulse.stop()
    connections._outgoing.put = _says_nothing  # type: ignore[method-assign]
    connections._outgoing.put_at_once = lambda *_: None  # type: ignore[method-assign]
    for peer in connections._peers.values():
        peer.route = type(peer.route)("await")  # it dials nobody again
        if peer.conversation is not None:
            peer.conversation.cut()
    for dialling in connections._diallings.values():
        dialling.close()
    if connections._server is not None:
        connections._server.stop()


def _says_nothing(*_: Any, **__: Any) -> None:
    raise KilledError


def _stop(conversation: Conversation, thawed: threading.Event) -> None:
    """What comes is read no further, and what is queued does not leave."""
    take = conversation._take

    def waits(chunk: bytes) -> bool:
        thawed.wait()
        return take(chunk)

    conversation._take = waits


def _stop_sending(outgoing: Outgoing, thawed: threading.Event) -> None:
    queued = outgoing._queued

    def waits(*arguments: Any) -> bool:
        thawed.wait()
        return queued(*arguments)

    outgoing._queued = waits  # type: ignore[method-assign]
    outgoing.put_at_once = lambda *_: None  # type: ignore[method-assign]


@contextlib.contextmanager
def at_relayed_frame(run: TrainingOverLinks, relay: str, number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Inside, `act` is called once, on a thread of its own, when `relay` has got frame `number` to pass on; then its name is in the
    list."""
    count, lock, done = [0], threading.Lock(), list[str]()

    def watch(party: str, _sender: str, frame: Frame) -> None:
        if party != relay or frame.kind != Kind.RELAY:
            return
        with lock:
            count[0] += 1
            now = count[0] == number
        if now:
            done.append(relay)
            act()

    run.watchers.append(watch)
    yield done
