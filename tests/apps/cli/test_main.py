"""The command line itself: what it lists, how it complains, and what it imports before a command runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command, get_group

import mpc_fl
from mpc_fl.apps.cli import main as cli
from mpc_fl.apps.cli.commands import GROUPS, app

PROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
COMMANDS = ["train", "infer", "serve", "report", "party", "check", "estimate", *GROUPS]


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def every_command() -> Iterator[list[str]]:
    yield []
    for name in COMMANDS:
        yield [name]
        if name in GROUPS:
            for inner in get_group(importlib.import_module(f"mpc_fl.apps.cli.{name}").app).commands:
                yield [name, inner]


def test_the_version_is_that_of_the_project(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, monkeypatch, "--version") == (0, f"mpc-fl {mpc_fl.__version__}\n", "")
    assert tomllib.loads(PROJECT.read_text())["project"]["version"] == mpc_fl.__version__


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_help_shows_flags_as_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    status, text, complained = said(capsys, monkeypatch, *words, "--help")
    assert (status, complained) == (0, "")
    assert "Show this message and exit." in text and "bool" not in text


def test_help_lists_every_command_and_the_first_sentence_of_every_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text, _ = said(capsys, monkeypatch, "--help")
    lines = [line.strip("│ \n") for line in text.splitlines()]
    named = [
        line.split(maxsplit=1)[0]
        for line in lines[lines.index(next(x for x in lines if "Commands" in x)) + 1 :]
        if line
    ]
    assert [name for name in named if name in COMMANDS] == COMMANDS
    for name, summary in GROUPS.items():
        own = get_group(importlib.import_module(f"mpc_fl.apps.cli.{name}").app).help
        assert own is not None and own.split("\n\n")[0] == summary
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "--foo"], "no such option: --foo (Possible options: --from, --out): see mpc-fl train --help"),
        (["train"], "missing argument 'CONFIG': see mpc-fl train --help"),
        (["train", "x.yaml"], "missing option '--out': see mpc-fl train --help"),
        (["trian"], "no such command 'trian'. Did you mean 'train'?: see mpc-fl --help"),
        (["pki", "isue"], "no such command 'isue'. Did you mean 'issue'?: see mpc-fl pki --help"),
        (
            ["bench", "links", "--echoes", "0"],
            "invalid value for '--echoes': Input should be greater than or equal to 1: see mpc-fl bench links --help",
        ),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    assert said(capsys, monkeypatch, *words) == (2, "", f"mpc-fl: {complaint}\n")


@pytest.mark.parametrize("words", [[], ["pki"], ["bench"]])
def test_a_group_without_a_command_shows_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    status, text, complained = said(capsys, monkeypatch, *words)
    assert (status, complained) == (2, "") and "Usage: " in text and "Commands" in text


def completed(*words: str) -> list[str]:
    """What a shell is told to offer for the last of the words."""
    environment = {**os.environ, "_MPC_FL_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": " ".join(["mpc-fl", *words]), "COMP_CWORD": str(len(words))}
    program = "from mpc_fl.apps.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_a_shell_completes_commands_groups_and_options() -> None:
    assert completed("est") == ["estimate"]
    assert completed("pki", "i") == ["init", "issue"]
    assert completed("train", "--l") == ["--ledger"]


def test_completion_can_be_installed() -> None:
    options = [option for parameter in get_command(app).params for option in parameter.opts]
    assert {"--install-completion", "--show-completion", "--version"} <= set(options)


def imported_by(program: str) -> set[str]:
    """Top-level packages, and modules of mpc_fl, that a fresh process holds after a program."""
    program += "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_what_it_shows_alone() -> None:
    program = """
import sys
from mpc_fl.apps.cli.main import main
sys.argv = ["mpc-fl", "--help"]
try:
    main()
except SystemExit:
    pass
"""
    held = imported_by(program)
    heavy = {
        "torch",
        "numpy",
        "pydantic",
        "yaml",
        "cryptography",
        "ssl",
        "matplotlib",
        "PIL",
        "sklearn",
        "safetensors",
    }
    assert held & heavy == set()
    own = {name for name in held if name.startswith("mpc_fl.") and not name.startswith("mpc_fl.apps.cli")}
    own -= {
        f"mpc_fl.{name}"
        for name in ("apps.formats", "chosen_names", "errors", "exhaustion", "files", "parsing", "roles")
    }  # of the standard library
    assert own == {"mpc_fl.apps"}


def test_a_process_that_imports_the_entry_point_again_pays_nothing() -> None:
    for module in ("mpc_fl.__main__", "mpc_fl.apps.cli.main"):
        held = imported_by(f"import {module}")
        assert held & {"typer", "rich", "torch", "pydantic"} == set()


def test_no_run_imports_what_draws_its_report() -> None:
    assert imported_by("import mpc_fl.apps.runs.local_runs") & {"matplotlib", "sklearn", "rich", "typer"} == set()


def test_what_is_logged_where_there_is_no_log_is_not_told_beside_the_error() -> None:
    """A hospital that asked a frozen dealer was told twice: the loss was logged, and ended the command."""
    program = (
        "import logging; from mpc_fl.apps.cli import main; from mpc_fl.errors import MpcFlError\n"
        "def fail():\n"
        "    logging.getLogger('mpc_fl.links').warning('dealer is silent')\n"
        "    raise MpcFlError('dealer is silent', 'see its log')\n"
        "main._run = fail; main.main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.splitlines() == ["mpc-fl: dealer is silent: see its log"]


@pytest.mark.parametrize("logged", [False, True])
def test_a_signal_that_comes_in_a_destructor_ends_the_command_all_the_same(logged: bool, tmp_path: Path) -> None:
    """Python drops what is raised there: SIGTERM that came while a module was imported left a traceback, and no end."""
    program = (
        "import os, signal, time; from pathlib import Path; from mpc_fl.apps.cli import main\n"
        "from mpc_fl.apps.runs.party_log import set_up_log\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        sum(range(1000))\n"
        "def run():\n"
        f"    {logged} and set_up_log(Path({str(tmp_path / 'log')!r}))\n"
        "    Dropped(); time.sleep(30); return 0\n"
        "main._run = run; main.main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.splitlines() == ["mpc-fl: interrupted by SIGTERM: nothing was left running"]
    assert ended.returncode == 143
