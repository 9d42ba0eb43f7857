"""The dealer: hands out correlated randomness for inferences and checks of norms. It sees shapes, no share of anything."""

from __future__ import annotations

from mpc_fl.aggregation.norm_check_session import serve_checks
from mpc_fl.config.config import Config
from mpc_fl.inference.diagnosis import deal_tuples
from mpc_fl.inference.serving.server import serve_correlations
from mpc_fl.inference.serving.stopping import until_told_to_stop
from mpc_fl.links.links import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Serve an inference until both computing parties are finished, or the checks of a training run until its end."""
    if config.task == "serve":
        with until_told_to_stop() as stopped:
            serve_correlations(config, notify, stopped, observer)
        return
    out = site_directory(config)
    links = connect(config, DEALER, observer)
    with links:
        notify("connect", 1, 1)
        links.set_phase("correlated randomness")
        if config.task == "train":
            serve_checks(links, config.runtime.dealer_ahead_bytes)
        else:
            deal_tuples(config, links)
    write_traffic(links, out)
