"""Parties under a launcher: one is lost (`frozen_programs`), and the others train round 3 when it asks to come back."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import NoReturn

from tests.support import frozen_programs
from tests.support.held_party import hold


def party_process(pipe: Connection) -> NoReturn:
    """The real one, changed so."""
    hold({3: [(os.environ[frozen_programs.FREEZE].split("/")[0], "asks")]})
    frozen_programs.party_process(pipe)
