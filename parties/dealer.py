"""The dealer: hands out correlated randomness for inferences. It sees shapes, no share of anything.

What a task needs is imported when the task is known, so that a dealer of the engine `fast` starts without CrypTen.
"""

from __future__ import annotations

from collections.abc import Callable

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.links.frames import Observer
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Serve an inference until both computing parties are finished. Raises `ConfigError` for training, which has no dealer."""
    if config.task == "serve":
        from mpc_fl.inference.serving.dealer_server import serve_correlations
        from mpc_fl.inference.serving.stopping import until_told_to_stop

        with until_told_to_stop() as stopped:
            serve_correlations(config, notify, stopped, observer)
        return
    out, deal = site_directory(config), _dealing(config)
    links = connect(config, DEALER, observer)
    with links:
        notify("connect", 1, 1)
        links.set_phase("correlated randomness")
        deal(links)
    write_traffic(links, out, config.site.costs)


def _dealing(config: Config) -> Callable[[Links], object]:
    """What this dealer does on its links; imported before it connects, so that nobody waits for it."""
    if config.task == "train":
        raise ConfigError("training has no dealer", "start hospitals and the aggregator alone")
    from mpc_fl.inference.diagnosis import dealing_of

    return dealing_of(config)
