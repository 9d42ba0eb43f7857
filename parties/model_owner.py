"""The model owner: second party of encrypted inference. It never sees an image, an activation or a prediction.

What a task needs is imported when the task is known: one diagnosis takes no server, and a server no single session.
"""

from __future__ import annotations

import logging

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.links.frames import Observer
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import MODEL_OWNER

log = logging.getLogger(__name__)


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Share the weights and compute on shares until the hospital has asked about its last image; or serve all hospitals."""
    if config.task == "serve":
        from mpc_fl.inference.serving.server import serve_model
        from mpc_fl.inference.serving.stopping import until_told_to_stop

        with until_told_to_stop() as stopped:
            serve_model(config, notify, stopped, observer)
    else:
        _answer(config, notify, observer)


def _answer(config: Config, notify: Notify, observer: Observer | None) -> None:
    """One diagnosis, or the filling of a pool. Raises `ConfigError` without a model, `UnsupportedLayerError` for others."""
    from mpc_fl.inference.diagnosis import answer_requests, require_supported
    from mpc_fl.learning.models.model_file import load_model, note_on_films

    out = site_directory(config)
    if config.site.model is None:
        raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
    model = load_model(config.site.model, config)
    require_supported(config, model)
    if note := note_on_films(config.site.model, config):
        log.warning("%s", note)
    notify("load model", 1, 1)
    links = connect(config, MODEL_OWNER, observer)
    with links:
        notify("connect", 1, 1)
        answer_requests(config, model, links, OpeningRecord(out / "openings.jsonl", MODEL_OWNER))
    write_traffic(links, out, config.site.costs)
