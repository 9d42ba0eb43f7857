"""A finished run on this machine that is given more rounds: what its parties need beside what they kept.

Its keys are gone, so new ones are made by another authority, whose certificate joins those of before (`earlier_authorities.crt`):
the reveal ledger goes on under both. The session keeps its name, by which privacy ledgers know the run. A continuation that opens
nothing leaves the finished run as it was; from then on it is a run that failed, and `--resume` goes on with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mpc_fl.apps.runs.local_parties import SESSION_FILE
from mpc_fl.apps.runs.run_directory import FROM_ALL, forget_identities, has_state, is_finished
from mpc_fl.apps.summaries import SUMMARY_FILE
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.ledger_file import EARLIER_FILE
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.config.config import Config, party_names
from mpc_fl.config.continuing import ROUNDS, require_same_run
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.errors import ConfigError, MpcFlError
from mpc_fl.files import write_text
from mpc_fl.roles import AGGREGATOR

_CONFIG_FILE = "config.yaml"


def require_more_rounds(out: Path, config: Config) -> None:
    """Where `out` is a finished run: it can be given the rounds of `config`. Raises `ConfigError`, which names what keeps it."""
    if not is_finished(out):
        return
    began = load_config(out / _CONFIG_FILE)
    require_same_run(began.settings_of_run(), config, f"the run {out}")
    if config.training.rounds == began.training.rounds:
        raise ConfigError(
            f"the run {out} is complete with {began.training.rounds} rounds", f"set {ROUNDS} to more to go on with it"
        )
    if not has_state(out):
        raise ConfigError(
            f"the run {out} kept no state to go on from", "begin a new run from its model: --from model.safetensors"
        )


@contextlib.contextmanager
def reopened(directory: Path, config: Config) -> Iterator[None]:
    """A run's directory while its parties work. Where the run was finished, it is again if nothing was signed in between."""
    if not is_finished(directory):
        yield
        return
    leading = [directory / "parties" / name for name in (party_names(config) if config.among_peers else [AGGREGATOR])]
    places = (directory, *(directory / "parties" / name for name in party_names(config)))
    paths = (
        directory / _CONFIG_FILE,
        directory / SUMMARY_FILE,
        *(place / name for place in places for name in (EARLIER_FILE, ROOT_FILE)),
    )
    before = {path: _text(path) for path in paths}
    signed = (directory / LEDGER_FILE).stat().st_size
    write_text(directory / SESSION_FILE, _session_of(directory / LEDGER_FILE))
    authorities = (_text(directory / EARLIER_FILE) or "") + (_text(directory / ROOT_FILE) or "")
    for place in places:
        write_text(place / EARLIER_FILE, authorities)
    (directory / SUMMARY_FILE).unlink()  # no finished run from here on
    try:
        yield
    except BaseException:
        ledgers = [place / LEDGER_FILE for place in leading if (place / LEDGER_FILE).exists()]
        if ledgers and all(ledger.stat().st_size <= signed for ledger in ledgers):
            for name in () if config.among_peers else FROM_ALL:  # among peers they lie there, and all have their own
                if (leading[0] / name).exists():
                    (leading[0] / name).replace(directory / name)
            forget_identities(config, directory)
            for path, text in before.items():
                if text is None:
                    path.unlink(missing_ok=True)
                else:
                    write_text(path, text)
        elif config.among_peers:  # what all have alike is that of the run as it was
            for name in FROM_ALL:
                (directory / name).unlink(missing_ok=True)
        raise


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise MpcFlError(f"{path} cannot be read", "restore it from a backup") from None


def _session_of(ledger: Path) -> str:
    """The session that a ledger's last parties had."""
    sessions = []
    for line in ledger.read_bytes().splitlines():
        try:
            block = parse_line(line)
        except ValueError:
            raise MpcFlError(f"{ledger} is damaged or was edited", "see what with: mpc-fl ledger verify") from None
        sessions += [] if block.members is None else [block.members.session]
    if not sessions:
        raise MpcFlError(f"{ledger} holds no start of a run", "see what with: mpc-fl ledger verify")
    return sessions[-1]
