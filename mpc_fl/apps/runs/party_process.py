"""A party's process: one role's program, its log, and how it ends.

At a site the command line runs it (`run_alone`). On one machine the launcher has it forked (`party_process`), with one pipe
between the two, in JSON: the launcher sends name and configuration, then nothing but which other party has ended, where this one
shall not serve on without it; the party sends progress, signs of life and the final word. A party whose pipe breaks ends itself,
so that no orphan outlives a killed launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from mpc_fl.apps.runs.memory import peak_memory
from mpc_fl.apps.runs.party_log import log_nowhere, say_lost_log, set_up_log
from mpc_fl.chosen_names import told_by_name
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.site_rules import Broken, broken_rules, distrusted, other_names, refusal, rules_of
from mpc_fl.errors import ConfigError, MpcFlError, PeerLostError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.files import OTHERS_MAY_NOTHING
from mpc_fl.links.silence import SIGN
from mpc_fl.roles import AGGREGATOR, DEALER, HOSPITAL_ROLE, MODEL_OWNER, split_name

ROLES = {HOSPITAL_ROLE: "parties.hospital", AGGREGATOR: "parties.aggregator", DEALER: "parties.dealer",
         MODEL_OWNER: "parties.model_owner"}  # fmt: skip
ORPHANED = 3  # exit status of a party whose launcher is gone
_LOCK_PATIENCE = 0.1


def _end_with_launcher(pipe: Connection) -> None:
    """All that the launcher may still say is why a party that serves without end shall stop; else it is gone."""
    while True:
        try:
            told = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(ORPHANED)
        from mpc_fl.inference.serving.stopping import stop_because

        stop_because(PeerLostError(told["ended"], told["how"], f"see the log of {told['ended']}"))


def wait_for_locks_with_patience() -> None:
    """Let a thread that waits for Python's lock ask for it 10 times a second, not 200.

    A party of 65 has some 200 threads, nearly all of which wait for a peer. On a machine where 65 such parties share two cores,
    whoever has the lock seldom runs, and those that asked for it took most of the time: 80 s to connect instead of 13.
    """
    sys.setswitchinterval(_LOCK_PATIENCE)


def _give_signs(tell: Callable[..., None]) -> None:
    """Whatever the program does, as long as this process is not stopped the launcher hears of it."""
    while True:
        tell(alive=True)
        time.sleep(SIGN)


def require_site_allows(config: Config, name: str | None = None, by_itself: bool = False) -> None:
    """Raise `ConfigError` where rules of this site forbid the run, or the authority that certified `name`, naming all of them.

    A party `by_itself` is this site; others are simulated here, each with a privacy ledger of its own.
    """
    require_may_record(config)
    broken = list[Broken]()
    for file in rules_of(config):
        broken += broken_rules(config, file, name)
        if by_itself and name is not None and config.task == "train":
            broken += other_names(file, name)
        if name is not None and config.site.identity is not None and file.rules.authorities is not None:
            from mpc_fl.crypto.certificates import load_root
            from mpc_fl.crypto.identity_files import load_identity
            from mpc_fl.crypto.signatory import fingerprint

            authority = load_root(load_identity(config.site.identity, name).authority, str(config.site.identity))
            broken += distrusted(file, "authorities", fingerprint(authority))
    if broken:
        raise refusal(broken)


def require_may_record(config: Config) -> None:
    """Raise `ConfigError` where messages shall be recorded that may be about patients, and this site has not said that they may."""
    if not config.runtime.record_messages:
        return
    if config.task not in ("train", "infer"):
        raise ConfigError(
            "runtime.record_messages records the parties of train and infer alone, no service and no simulation",
            "set it to false",
        )
    is_real = config.data.source != "phantoms" or config.site.images is not None
    if is_real and not config.site.record_patients:
        raise ConfigError(
            "runtime.record_messages would keep messages about real patients, and this site has not allowed it",
            "record a run on phantoms, or give --set site.record_patients=true if everybody concerned has agreed",
        )


def run_party(name: str, config: Config, notify: Callable[[str, int, int], None], observer: Any = None) -> None:
    """Run one party's program in this process until it ends. Raises what the program raises."""
    require_site_allows(config, name)
    import torch

    torch.set_num_threads(config.runtime.threads)
    if config.task == "train":
        wait_for_locks_with_patience()
    role, rank = split_name(name)
    if role not in ROLES:
        raise ConfigError(f"there is no role '{role}'", f"the roles are {', '.join(ROLES)}")
    log = logging.getLogger("mpc_fl")
    log.info("%s starts (%s), process %d", name, config.task, os.getpid())
    from mpc_fl.apps.runs.curves import curves_of

    program = importlib.import_module(ROLES[role])
    if config.runtime.record_messages and observer is None:
        from mpc_fl.links.message_record import MESSAGES_DIRECTORY, MessageRecord
        from mpc_fl.links.party_links import site_directory

        directory = site_directory(config) / MESSAGES_DIRECTORY
        log.warning("all messages that this party receives are recorded in %s", directory)
        observer = MessageRecord(directory, config.runtime.recorded_bytes)
    if config.task != "train":
        program.run(config, rank, notify, observer)
    else:
        with curves_of(config, name):
            program.run(config, rank, notify, observer)
    if role == AGGREGATOR or (config.task == "train" and config.among_peers):  # who has what was opened
        from mpc_fl.apps.runs.model_card_file import write_model_card
        from mpc_fl.links.party_links import site_directory

        write_model_card(config, site_directory(config))
    log.info("%s has finished, its peak memory was %d MB", name, peak_memory() // 10**6)


def unforeseen(error: BaseException) -> MpcFlError:
    """Log and name an error that no code foresaw by its type and place: its message could quote data, so it is lost.

    What the system refused (`exhaustion`) is no defect, and told as what it is.
    """
    log = logging.getLogger("mpc_fl")
    found = exhaustion(error)
    frames = traceback.extract_tb(error.__traceback__)
    for frame in frames:
        log.error("at %s:%s in %s", frame.filename, frame.lineno, frame.name)
    if found is not None:
        log.error("%s", found)
        return found
    log.error("unexpected %s", type(error).__name__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
    return MpcFlError(f"unexpected {type(error).__name__} at {place} (a defect; see the log)")


@contextlib.contextmanager
def quoting_nothing() -> Iterator[None]:
    """Raise `MpcFlError` alone, for whatever else is raised within `unforeseen`."""
    try:
        yield
    except MpcFlError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is
        raise unforeseen(error) from None


def run_alone(name: str, config: Config, notify: Callable[[str, int, int], None]) -> None:
    """`run_party` where no launcher watches. Raises `MpcFlError` alone: a traceback could quote data or a model."""
    with told_by_name(config.federation.chosen_names), quoting_nothing():
        run_party(name, config, notify)


def _show_name(name: str) -> None:
    """Let `ps` and `top` tell the parties apart, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


def party_process(pipe: Connection) -> NoReturn:
    """Be the party that the launcher names over `pipe`, until its program ends or the launcher is gone."""
    try:
        told = json.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(ORPHANED)
    name: str = told["name"]
    _show_name(name)
    os.umask(OTHERS_MAY_NOTHING)
    lock = threading.Lock()

    def tell(**event: Any) -> None:
        try:
            with lock:
                pipe.send_bytes(json.dumps(event).encode())
        except OSError:
            os._exit(ORPHANED)

    log = logging.getLogger("mpc_fl")
    log_nowhere()  # until there is a log of its own: the launcher is told, and says it once
    code = 0
    try:
        config = parse_config(told["values"], f"configuration of {name}")
        set_up_log(config.site.log, config.federation.chosen_names)
        threading.Thread(target=_end_with_launcher, args=(pipe,), daemon=True).start()
        threading.Thread(target=_give_signs, args=(tell,), daemon=True).start()
        run_party(name, config, lambda phase, done, total: tell(phase=phase, done=done, total=total))
        tell(finished=True)
    except MpcFlError as error:
        log.error("%s", error)
        tell(error=str(error), peer=error.cause if isinstance(error, PeerLostError) else None, time=time.time())
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - the last frame of the process: report, then end with a code
        found = unforeseen(error)
        tell(error=str(found), peer=None, time=time.time())
        code = found.exit_code
    if code == 0:
        say_lost_log(config.site.log)
    logging.shutdown()
    os._exit(code)  # threads of a lost link must not keep the process
