"""The entry point `mpc-fl`: runs one command and turns what goes wrong into one line and an exit code.

Importing this module costs next to nothing, because every process that is started from here imports it again: the commands
are imported when the command line is used, what a command needs when it runs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from mpc_fl.apps.cli.interrupts import Interrupted
from mpc_fl.errors import MpcFlError
from mpc_fl.exhaustion import exhaustion

if TYPE_CHECKING:
    import typer

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_LATER = 0.01


def _interrupted(number: int, _frame: object) -> NoReturn:
    for interrupt in _INTERRUPTS:
        signal.signal(interrupt, signal.SIG_IGN)  # a second one must not stop the cleaning up, which takes seconds
    raise Interrupted(number)


def _dropped(failed: sys.UnraisableHookArgs) -> None:
    """An interrupt that came in a destructor or a callback, where Python drops what is raised: it is raised again elsewhere."""
    error = failed.exc_value
    if not isinstance(error, Interrupted):
        return sys.__unraisablehook__(failed)
    number = error.number
    signal.signal(signal.SIGALRM, lambda *_: _interrupted(number, None))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_LATER)
    return None


def main() -> None:
    """Run the command in `sys.argv`: one line per error and its exit code, never a traceback for what a user can mend."""
    from mpc_fl.apps.cli.standard_streams import open_standard_streams

    open_standard_streams()
    from mpc_fl.files import OTHERS_MAY_NOTHING

    logging.getLogger("mpc_fl").addHandler(logging.NullHandler())  # standard error is for what the user is told
    # An ignored signal stays ignored: SIGHUP under nohup, SIGINT of a job in the background.
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number in (number for number in _INTERRUPTS if before[number] != signal.SIG_IGN):
        signal.signal(number, _interrupted)
    umask, sys.unraisablehook = os.umask(OTHERS_MAY_NOTHING), _dropped
    alarm = signal.getsignal(signal.SIGALRM)
    try:
        raise SystemExit(_run())
    except MpcFlError as error:
        _end(str(error), error.exit_code)
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        _end_exhausted(error)
    except Interrupted as error:
        _end(str(error), 128 + error.number)
    finally:
        os.umask(umask)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = sys.__unraisablehook__
        for number, handler in {**before, signal.SIGALRM: alarm}.items():
            signal.signal(number, handler)


def _run() -> int:
    """The exit code of the command; a usage that is wrong is told in one line."""
    import typer

    from mpc_fl.apps.cli.commands import app
    from mpc_fl.apps.cli.standard_streams import flush_output

    try:
        code = int(app(prog_name="mpc-fl", standalone_mode=False) or 0)
        flush_output()
        return code
    except typer.TyperException as error:
        if error.format_message():
            _end(_wrong_usage(error), error.exit_code)
        return error.exit_code  # a group without a command: its help was printed
    except typer.Abort:
        _end("aborted", 1)


def _wrong_usage(error: typer.TyperException) -> str:
    what = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    see = "" if context is None else f": see {context.command_path} --help"
    return what[:1].lower() + what[1:] + see


def _end_exhausted(error: Exception) -> NoReturn:
    """What the system refused, in one line. Raises `error` again where it says something else."""
    found = exhaustion(error)
    if found is None:
        raise error
    if isinstance(error, MemoryError):  # there is none left to say it in colour, nor for what libraries do at the end
        os.write(2, f"mpc-fl: {found}\n".encode())
        os._exit(found.exit_code)
    _end(str(found), found.exit_code)


def _end(message: str, code: int) -> NoReturn:
    from mpc_fl.apps.cli.options import error_console

    error_console().print(f"mpc-fl: {message}", style="red", markup=False, soft_wrap=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
