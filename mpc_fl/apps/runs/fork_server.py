"""The process that a launcher's parties are forked from: it imports once what each of them needs, and holds nothing else.

Importing torch takes a second of processor time; a fork takes milliseconds. What a fork copies must therefore be fit to be
copied:

- No secret. The server is a fresh interpreter, not a fork of the launcher, and is started before the launcher reads a key,
  an image or a model. It never sees what a party is told either: it passes on the party's end of a pipe unread, and the
  forked party reads its name and configuration from that. Parties therefore inherit nothing of each other.
- No randomness. Seeds and keys of this project are drawn from the system when they are used, never at import. Python and
  OpenSSL renew their own generators in a fork; the global ones of numpy and torch, which a fork would repeat, serve nothing.
- No thread: a lock that another thread holds would stay locked in the copy. The server refuses to fork when it finds a
  second one. (OpenBLAS would start some when numpy is imported, so the launcher allows it one; `runtime.threads` is
  torch's number, which starts its threads at the first large operation.)

The server never sees SIGINT, SIGTERM or SIGHUP, which reach all processes of a terminal: it lives exactly as long as the
launcher's end of its socket is open. Then it ends the parties that are left, by force after `END_GRACE`, and itself.
Parties get SIGTERM and SIGHUP again, and never SIGINT: the launcher decides what Ctrl-C means.

Only the standard library is imported here, so that the server's own start costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

READY = b"ready"  # what the server says once it has imported everything; anything else is why it cannot go on
END_GRACE = 3.0
KEPT_FROM_THE_SERVER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FOR_PARTIES = (signal.SIGTERM, signal.SIGHUP)


def main() -> NoReturn:
    """The server's process. `sys.argv` names the descriptor of its socket, the module whose `party_process` a party runs,
    and the modules to share, separated by commas."""
    gc.disable()  # a collection would move through, and so copy, what parties share with the server
    launcher, program, shared = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3].split(",")
    code = 1
    try:
        _import_all([*shared, program], launcher)
        require_one_thread()
        gc.freeze()
        launcher.sendall(READY)
        code = _serve(launcher, sys.modules[program].party_process)
    except ConnectionError:  # the launcher is gone
        pass
    except Exception as error:  # noqa: BLE001 - where memory runs out, an import raises anything
        with contextlib.suppress(OSError):
            launcher.sendall(_described(error).encode())
    os._exit(code)


def _described(error: Exception) -> str:
    from mpc_fl.exhaustion import exhaustion  # of the standard library, too; imported only here

    return str(exhaustion(error) or f"{type(error).__name__}: {error}")


def _import_all(modules: Sequence[str], launcher: socket.socket) -> None:
    for module in modules:
        if module:
            importlib.import_module(module)
        if _closed(launcher):
            raise BrokenPipeError


def _closed(launcher: socket.socket) -> bool:
    try:
        return launcher.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def require_one_thread() -> None:
    """Raise `RuntimeError` when this process has a second thread, of Python or of a library."""
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    if threads != 1:
        raise RuntimeError(f"{threads} threads run in the process that parties are forked from")


# ---- serving -----------------------------------------------------------------------------------------------------------


def _serve(launcher: socket.socket, party_process: Callable[[Connection], NoReturn]) -> int:
    """Fork a party for each pair of descriptors, tell of each end, until the launcher is gone; the exit status."""
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_unused: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    parties: dict[int, Connection] = {}  # where to tell of the end of each
    private = [launcher.fileno(), woken, wake]
    while True:
        readable, _, _ = select.select([launcher.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _tell_of_ends(parties)
        if launcher.fileno() in readable:
            message, descriptors, _, _ = socket.recv_fds(launcher, 1, 2)
            if not message:
                _end_all(parties)
                return 0
            if len(descriptors) != 2:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pipe, ends = (Connection(descriptor) for descriptor in descriptors)
            require_one_thread()
            process = os.fork()
            if process == 0:
                _leave_server([*private, ends.fileno(), *(other.fileno() for other in parties.values())])
                _run(party_process, pipe)
            pipe.close()
            parties[process] = ends
            _tell(ends, started=process)


def _leave_server(private: Sequence[int]) -> None:
    """In the fork: leave everything of the server behind."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in private:
        os.close(descriptor)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_PARTIES)
    gc.enable()


def _run(party_process: Callable[[Connection], NoReturn], pipe: Connection) -> NoReturn:
    try:
        party_process(pipe)
    except BaseException:  # noqa: BLE001 - a fork must never run on as a second server
        traceback.print_exc()
    finally:
        os._exit(1)


def _tell(ends: Connection, **event: int) -> None:
    with contextlib.suppress(OSError):  # the launcher has closed it
        ends.send_bytes(json.dumps(event).encode())


def _tell_of_ends(parties: dict[int, Connection]) -> None:
    while parties:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        ends = parties.pop(process)
        _tell(ends, ended=os.waitstatus_to_exitcode(status))
        ends.close()


def _end_all(parties: dict[int, Connection]) -> None:
    """The launcher is gone, or has no more use for any party."""
    deadline = time.monotonic() + END_GRACE
    for process in parties:
        os.kill(process, signal.SIGTERM)
    while parties and time.monotonic() < deadline:
        _tell_of_ends(parties)
        time.sleep(0.01)
    for process in parties:
        os.kill(process, signal.SIGKILL)
    for process in parties:
        os.waitpid(process, 0)
