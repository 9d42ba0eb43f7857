"""A hospital in encrypted diagnosis: it asks about its images, or stores correlations for images to come.

The other side is one model owner for one session (`diagnose`, `fill`), or one that stays up and serves several hospitals
(`ask`, `fill_from_server`). Neither an image nor a result leaves the hospital in the clear.
"""

from __future__ import annotations

import torch

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.errors import RefusedError
from mpc_fl.inference.diagnosis import request_diagnoses, require_supported
from mpc_fl.inference.fast.diagnosis import fill_pool
from mpc_fl.inference.results import require_no_doubt, write_results
from mpc_fl.inference.serving.client import ask_service, fill_from_service, links_to_service
from mpc_fl.inference.serving.visits import Visit
from mpc_fl.learning.data.loading import load_images
from mpc_fl.links.frames import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import HOSPITAL


def diagnose(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Get class probabilities for this hospital's images; neither image nor result leaves it in the clear.

    Raises `ProtocolError` when an image got no result, once all is over and the other results are written.
    """
    out, name = site_directory(config), HOSPITAL
    images = load_images(config.site.images, config, config.inference.limit)
    require_supported(config)
    notify("load data", 1, 1)
    links = connect(config, name, observer)
    with links:
        notify("connect", 1, 1)
        results = request_diagnoses(config, images, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_results(config, images, results, out)
    write_traffic(links, out, config.site.costs)
    require_no_doubt(results)


def ask(config: Config, name: str, notify: Notify, observer: Observer | None = None) -> None:
    """Get class probabilities for this hospital's images from a model owner that stays up.

    Raises `RefusedError`, which says when to come back, once what was answered until then is written; `ProtocolError` when
    an image got no result.
    """
    out = site_directory(config)
    images = load_images(config.site.images, config, config.inference.limit)
    require_supported(config)
    notify("load data", 1, 1)
    links = links_to_service(config, Visit(name), observer)
    with links:
        notify("connect", 1, 1)
        results, refusal = ask_service(config, images, links, OpeningRecord(out / "openings.jsonl", name), notify)
    count = len(results)
    write_results(config, images.only(torch.arange(count)), results, out)
    write_traffic(links, out, config.site.costs)
    require_no_doubt(results)
    if refusal is not None:
        raise RefusedError(f"{count} of {len(images)} images were answered; {refusal.what}", refusal.fix)


def fill(config: Config, notify: Notify, observer: Observer | None = None) -> None:
    """Store correlations for diagnoses to come in this hospital's pool; it takes no image."""
    out, name = site_directory(config), HOSPITAL
    require_supported(config)
    links = connect(config, name, observer)
    with links:
        notify("connect", 1, 1)
        fill_pool(config, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_traffic(links, out, config.site.costs)


def fill_from_server(config: Config, name: str, notify: Notify, observer: Observer | None = None) -> None:
    """The same with a model owner that stays up; raises `RefusedError` when it keeps no more for this hospital."""
    out = site_directory(config)
    require_supported(config)
    links = links_to_service(config, Visit(name, "fill"), observer)
    with links:
        notify("connect", 1, 1)
        fill_from_service(config, links, OpeningRecord(out / "openings.jsonl", name), notify)
    write_traffic(links, out, config.site.costs)
