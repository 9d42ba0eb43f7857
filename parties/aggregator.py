"""The aggregator: leads the rounds, takes masked updates, learns their opened mean and nothing about one hospital.

What it does is `mpc_fl.federation.aggregator_program`, imported when it is needed: that takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpc_fl.config.config import Config
    from mpc_fl.links.frames import Observer
    from mpc_fl.progress import Notify


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in a training run until its last round; write model, metrics and opening record to `site.out`."""
    from mpc_fl.federation import aggregator_program

    aggregator_program.run(config, notify, observer)
