"""Parties under a launcher of which one stops or hangs: `party_process` as the fork server runs it in a test.

The environment says which one, where and how: FREEZE='hospital-1/<moment>/<how>'. A moment is a phase, or 'end' after the last
word to the launcher; how is 'stops' (SIGSTOP), 'dies' (SIGKILL) or 'hangs' (its other threads go on).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from mpc_fl.apps.runs import party_process as program
from mpc_fl.links.links import Links

FREEZE = "MPC_FL_TEST_FREEZE"


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


def party_process(pipe: Connection) -> NoReturn:
    """The real one, changed as the environment says; a party that was started again is not changed."""
    victim, moment, how = os.environ[FREEZE].split("/")
    freeze: Callable[[], None] = {"stops": _stop, "dies": _die, "hangs": _hang}[how]
    run_party, enter_phase, shut_down = program.run_party, Links.set_phase, logging.shutdown

    def run(name: str, config: object, *more: object) -> None:
        if name == victim and not (site := Path(config.site.out) / "frozen once").exists():  # type: ignore[attr-defined]
            site.touch()

            def enter(links: Links, phase: str) -> None:
                enter_phase(links, phase)
                if phase == moment:
                    freeze()

            def end() -> None:
                shut_down()
                if moment == "end":
                    freeze()

            Links.set_phase, logging.shutdown = enter, end  # type: ignore[method-assign, assignment]
        run_party(name, config, *more)  # type: ignore[arg-type]

    program.run_party = run  # type: ignore[assignment]
    program.party_process(pipe)
