"""The reveal ledger of a training run: when all parties sign, and which public values they vouch for."""

from __future__ import annotations

import hashlib

from torch import nn

from mpc_fl.co_signing import begin, co_sign
from mpc_fl.config import AGGREGATOR, Config, party_names
from mpc_fl.ledger_file import RevealLedger, tensor_digest
from mpc_fl.models import flatten_parameters
from mpc_fl.transport import Links
from mpc_fl.weights import model_file


def begin_ledger(ledger: RevealLedger, links: Links, config: Config) -> None:
    """Before the first opening: all parties sign who they are, or go on with the ledger after a restart."""
    links.set_phase("reveal ledger")
    begin(ledger, links, party_names(config), AGGREGATOR, config.federation.session, config.digest())


def sign_round(ledger: RevealLedger, links: Links, config: Config, number: int, model: nn.Module) -> None:
    """Step 7, at all parties; also after the evaluation before the first round."""
    links.set_phase(f"round {number} signatures")
    same = {"global model": tensor_digest(flatten_parameters(model))}
    co_sign(ledger, links, party_names(config), AGGREGATOR, "openings", f"round {number}", same)


def sign_end(ledger: RevealLedger, links: Links, config: Config, model: nn.Module) -> None:
    """The last block: all sign that the run is complete, and which file its model is."""
    links.set_phase("reveal ledger")
    same = {"model.safetensors": hashlib.sha256(model_file(model, config)).hexdigest()}
    co_sign(ledger, links, party_names(config), AGGREGATOR, "end", "the run is complete", same)
