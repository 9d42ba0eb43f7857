"""The dealer: hands out correlated randomness for an inference. It sees operations and shapes, no share of anything."""

from __future__ import annotations

from mpc_fl.config import Config
from mpc_fl.dealer import Dealer
from mpc_fl.federation import Notify
from mpc_fl.membership import connect, site_directory, write_traffic
from mpc_fl.transport import Observer


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Serve tuples, ahead of need where the parties declared a program, until both computing parties are finished."""
    out = site_directory(config)
    links = connect(config, "dealer", observer)
    with links:
        notify("connect", 1, 1)
        links.set_phase("correlated randomness")
        Dealer(links, ["hospital-0", "model-owner"], config.runtime.dealer_ahead_bytes).serve()
    write_traffic(links, out)
