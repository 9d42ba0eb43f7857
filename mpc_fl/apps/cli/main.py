"""The command line: `mpc-fl train | infer | serve | report | party | check | estimate | pki | bench`."""

from __future__ import annotations

import signal
from typing import NoReturn

import typer

from mpc_fl.apps.cli import bench, dealer, diagnosis, ledger, pki, sites, training
from mpc_fl.apps.cli.options import errors
from mpc_fl.errors import MpcFlError

app = typer.Typer(
    name="mpc-fl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals learn together and diagnose together on secret-shared tensors. Start with: make demo",
)
for command in (training.train, diagnosis.infer, diagnosis.serve, sites.report, sites.party, training.check,
                training.estimate):  # fmt: skip
    app.command()(command)
for name, group in (("pki", pki.app), ("bench", bench.app), ("ledger", ledger.app), ("dealer", dealer.app)):
    app.add_typer(group, name=name)
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP. Not a KeyboardInterrupt, which typer would end without a word."""


def _interrupted(number: int, _frame: object) -> NoReturn:
    for interrupt in _INTERRUPTS:
        signal.signal(interrupt, signal.SIG_IGN)  # a second one must not stop the cleaning up, which takes seconds
    raise Interrupted(number)


def main() -> None:
    """Entry point: one line per error and its exit code, never a traceback for what a user can mend."""
    # An ignored signal stays ignored: SIGHUP under nohup, SIGINT of a job in the background.
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number in (number for number in _INTERRUPTS if before[number] != signal.SIG_IGN):
        signal.signal(number, _interrupted)
    try:
        app()
    except MpcFlError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        where = f" of {error.filename}" if error.filename else ""
        _end(f"input or output{where} failed: {error.strerror}: check permissions and free space", 1)
    except Interrupted as error:
        _end(f"interrupted by {signal.Signals(error.args[0]).name}: nothing was left running", 128 + error.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(message: str, code: int) -> NoReturn:
    errors.print(f"mpc-fl: {message}", style="red", markup=False, soft_wrap=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
