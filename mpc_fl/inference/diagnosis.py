"""Encrypted diagnosis between a hospital (rank 0) and a model owner (rank 1), with a dealer outside: one of two engines.

`inference.engine` chooses: `fast` for convolutional networks (`fast`, protocol in `fast.online.hospital_session`), or
`reference` for all others (`reference`, on CrypTen). Both have one interface: `request_diagnoses` at the hospital,
`answer_requests` at the model owner, `dealing_of` at the dealer, `require_supported` before anything is sent.

An engine is imported when it is chosen, so that a hospital or dealer of `fast` never loads CrypTen, and nobody but the model
owner loads what reads model files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from mpc_fl.audit.opening_record import Record
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.inference.inputs import as_the_model_takes_them, calibration_of_model, send_calibration
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.links.links import Links
from mpc_fl.progress import Notify
from mpc_fl.roles import HOSPITAL, MODEL_OWNER


def require_supported(config: Config, model: nn.Module | None = None) -> None:
    """Raise when the engine cannot run the network; nothing is sent. The hospital, without `model`, checks shapes alone.

    `UnsupportedLayerError` names the layer; `ModelError` says what else is wrong with `model`; `ConfigError`: the label
    alone shall be opened by an engine that opens logits.
    """
    if config.inference.engine != "fast" and config.reveal == "label":
        raise ConfigError("inference.reveal=label needs inference.engine=fast", "set the engine, or reveal logits")
    if model is None:
        from mpc_fl.learning.models.architectures import build_model

        model = build_model(config)
    if config.inference.engine == "fast":
        from mpc_fl.inference.fast.quantization.float_graph import prepare

        prepare(model)
    else:
        from mpc_fl.inference.reference.diagnosis import private_graph

        private_graph(config, model)


def request_diagnoses(config: Config, images: Dataset, links: Links, record: Record, notify: Notify) -> list[Diagnosis]:
    """The hospital's side of a session: one `Diagnosis` per record of `images`."""
    inputs = as_the_model_takes_them(config, images, links)
    calibration = calibration_of_model(config, links)
    if config.inference.engine == "fast":
        from mpc_fl.inference.fast import diagnosis as fast

        found = fast.ask(config, inputs, links, record, notify)
    else:
        from mpc_fl.inference.reference import diagnosis as reference

        graph = reference.public_graph(config)
        with reference.runtime_of(config, links) as runtime:
            found = reference.ask(config, graph, inputs.records, runtime.domain(record), notify)
    return [replace(diagnosis, calibration=calibration) for diagnosis in found]


def answer_requests(config: Config, model: nn.Module, links: Links, record: Record) -> int:
    """The model owner's side of a session; returns the number of batches.

    What inputs are normalised with is no secret of the model: it is told to the hospital, which normalises.
    """
    normalisation = _normalisation_of_inputs(config)
    if normalisation is not None:
        links.send_tensor(HOSPITAL, "normalisation", normalisation.tensor())
    model = _calibrated(config, model, links)
    if config.inference.engine == "fast":
        from mpc_fl.inference.fast import diagnosis as fast

        return fast.answer(config, model, normalisation, links, record)
    from mpc_fl.inference.reference import diagnosis as reference

    graph = reference.private_graph(config, model)
    with reference.runtime_of(config, links) as runtime:
        return reference.answer(config, graph, runtime.domain(record))


def _calibrated(config: Config, model: nn.Module, links: Links) -> nn.Module:
    """The model with the offsets of its file; the hospital is told what to make probabilities with."""
    if config.evaluation.calibrate == "none" or config.site.model is None:
        return model
    from mpc_fl.learning.models.class_offsets import with_offsets
    from mpc_fl.learning.models.model_file import load_calibration

    calibration = load_calibration(config.site.model, config)
    send_calibration(config, links, HOSPITAL, calibration)
    return with_offsets(model, config, calibration)


def _normalisation_of_inputs(config: Config) -> Normalisation | None:
    """What the model file says that inputs were normalised with. Raises `ConfigError`, `ModelError`."""
    if config.data.normalise == "none":
        return None
    if config.site.model is None:
        raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
    from mpc_fl.learning.models.model_file import load_normalisation

    return load_normalisation(config.site.model, config)


def dealing_of(config: Config) -> Callable[[Links], object]:
    """The dealer's side of a session, to be called with its links; the engine is imported now, before anybody waits."""
    if config.inference.engine == "fast":
        from mpc_fl.inference.fast.preprocessing.dealer import deal

        return lambda links: deal(links, HOSPITAL, MODEL_OWNER)
    from mpc_fl.sharing.dealer import Dealer

    ahead = config.runtime.dealer_ahead_bytes
    return lambda links: Dealer(links, [HOSPITAL, MODEL_OWNER], ahead).serve()
