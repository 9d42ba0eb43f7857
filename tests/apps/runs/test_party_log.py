"""A party's log: one line an event, whatever is in it, and in no file that is none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mpc_fl.apps.runs.party_log import set_up_log
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.errors import ConfigError


def test_a_name_with_line_breaks_begins_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):  # a run that goes on appends
        set_up_log(path)
        logging.getLogger("mpc_fl").warning(
            "skipped: %s", "a\n2026-11-27 00:00:00,000 INFO mpc_fl: all is well\x1b[2J\u2028.png"
        )
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and all("skipped: a 2026" in line and "\x1b" not in line for line in lines)


def test_a_log_is_appended_to_no_other_file(tmp_path: Path) -> None:
    """A configuration could name ~/.bashrc, and a class whose name a shell would run."""
    script = tmp_path / ".bashrc"
    script.write_text("alias ll='ls -l'\n")
    with pytest.raises(ConfigError, match=r"site.log .*bashrc exists and is no log"):
        set_up_log(script)
    assert script.read_text() == "alias ll='ls -l'\n"
    (tmp_path / "empty").touch()
    set_up_log(tmp_path / "empty")
    set_up_log(Path("/dev/null"))


def test_parties_are_logged_by_name_and_paths_are_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    set_up_log(path, ChosenNames.of({"hospital-1": "charite"}))
    logging.getLogger("mpc_fl").warning("%s is late, see logs/hospital-1.log; %s is not", "hospital-1", "hospital-11")
    assert path.read_text().endswith(": charite (hospital-1) is late, see logs/hospital-1.log; hospital-11 is not\n")
