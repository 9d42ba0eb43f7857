"""Encrypted diagnosis between a hospital (rank 0) and a model owner (rank 1), with a dealer outside.

`inference.engine` chooses between two engines with one interface: `request_diagnoses` at the hospital, `answer_requests`
at the model owner, `deal_tuples` at the dealer. `fast` is for convolutional networks, its protocol is in
`fast.sessions`. `reference` is for all others:

Protocol, once:
  1. the hospital announces the batch sizes (public)
  2. both record by a dry run what correlated randomness a batch of each size takes, and declare it to the dealer, which
     begins with the first batch's while
  3. the model owner shares its weights
Per batch of images:
  4. the hospital announces this batch's size and the next one's, and shares the images
  5. both evaluate the network on shares (`inference`), with the dealer's corrections made ahead of need (`dealer`)
  6. the logits are opened to the hospital alone

Security. Shares of image and weights are masked by the pairwise seed of the two parties, every opened intermediate is
masked by a triple (Beaver 1991), the logits reach only the hospital, refreshed by a zero-share. The model owner learns
shapes, the number and sizes of batches and timing; the hospital learns its logits, architecture and shapes; the dealer
learns shapes and timing. Semi-honest, and the dealer colludes with neither.
"""

from __future__ import annotations

from torch import nn

from mpc_fl.audit.opening_record import Record
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError
from mpc_fl.inference.fast.diagnosis import answering_session, asking_session, calibrated, diagnose_batches, pool_of
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool, OwnerPool
from mpc_fl.inference.fast.quantization.float_graph import prepare
from mpc_fl.inference.inputs import as_the_model_takes_them
from mpc_fl.inference.reference.diagnosis import answer, ask, private_graph, public_graph, runtime_of
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_normalisation
from mpc_fl.links.links import Links
from mpc_fl.progress import Notify
from mpc_fl.roles import HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.dealer import Dealer

# ---- either engine -------------------------------------------------------------------------------------------------


def require_supported(config: Config, model: nn.Module | None = None) -> None:
    """Raise when the engine cannot run the network; nothing is sent. The hospital, without `model`, checks shapes alone.

    `UnsupportedLayerError` names the layer; `ModelError` says what else is wrong with `model`; `ConfigError`: the label
    alone shall be opened by an engine that opens logits.
    """
    if model is None:
        model = build_model(config)
    if config.inference.engine == "fast":
        prepare(model)
        return
    if config.inference.reveal == "label":
        raise ConfigError("inference.reveal=label needs inference.engine=fast", "set the engine, or reveal logits")
    private_graph(config, model)


def request_diagnoses(config: Config, images: Dataset, links: Links, record: Record, notify: Notify) -> list[Diagnosis]:
    """The hospital's side of a session: one `Diagnosis` per record of `images`."""
    images = as_the_model_takes_them(config, images, links)
    if config.inference.engine == "fast":
        with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=False) as pool:
            return list(diagnose_batches(config, images, asking_session(config, links, record, pool), notify))
    graph = public_graph(config)
    with runtime_of(config, links) as runtime:
        return ask(config, graph, images, runtime.domain(record), notify)


def answer_requests(config: Config, model: nn.Module, links: Links, record: Record) -> int:
    """The model owner's side of a session; returns the number of batches.

    What inputs are normalised with is no secret of the model: it is told to the hospital, which normalises.
    """
    normalisation = None
    if config.data.normalise == "secure":
        if config.site.model is None:
            raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
        normalisation = load_normalisation(config.site.model, config)
    if normalisation is not None:
        links.send_tensor(HOSPITAL, "normalisation", normalisation.tensor())
    if config.inference.engine == "fast":
        calibration = calibrated(config, model, normalisation)
        filling = config.inference.fill > 0
        with pool_of(config, OwnerPool, MODEL_OWNER, HOSPITAL, filling) as pool:
            return answering_session(config, calibration, links, HOSPITAL, record, pool).serve()
    graph = private_graph(config, model)
    with runtime_of(config, links) as runtime:
        return answer(config, graph, runtime.domain(record))


def deal_tuples(config: Config, links: Links) -> None:
    """The dealer's side of a session."""
    if config.inference.engine == "fast":
        deal(links, HOSPITAL, MODEL_OWNER)
    else:
        Dealer(links, [HOSPITAL, MODEL_OWNER], config.runtime.dealer_ahead_bytes).serve()


# ---- engine fast ---------------------------------------------------------------------------------------------------


# ---- engine reference ----------------------------------------------------------------------------------------------
