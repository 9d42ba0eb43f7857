"""The dealer of the engine `fast`: makes S's corrections from two seeds and the shapes. It sees no share of anything.

It learns the public network, the number of records of each batch and when batches are asked for. It holds B, the masks of the
weights, and knows all masks: it must not collude with either party, and must not see their link.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.inference.fast.kernels.linear import linear_maps, weight_masks
from mpc_fl.inference.fast.messages import (
    BATCH,
    MASK_SEED,
    NETWORK,
    SEED,
    batch_from,
    correction_tag,
    hospital_seed,
    network_from,
)
from mpc_fl.inference.fast.network import Network
from mpc_fl.inference.fast.preprocessing.correlations import corrections_of, correlation_plan
from mpc_fl.links.links import Links


def _uncounted(network: Network, records: int) -> None:
    """Of a single diagnosis nobody signs a count."""


def deal(links: Links, hospital: str, owner: str, making: Callable[[Network, int], object] = _uncounted) -> int:
    """Serve batches until the hospital is done; returns their number.

    Both must announce the same batches in the same order. Raises `ProtocolError` if they do not. `making` is told the network
    and the records of each batch before its corrections leave.
    """
    links.set_phase("offline")
    description = links.receive_object(owner, NETWORK)
    network = network_from(description)
    hospital_root = hospital_seed(links.pairwise_seed(hospital, SEED), network)
    owner_root = links.pairwise_seed(owner, SEED)
    if MASK_SEED in description:  # B is that of a pool
        mask_seed = Seed(links.receive_tensor(owner, MASK_SEED, torch.uint8, (32,)).numpy().tobytes())
    else:
        mask_seed = owner_root.derive("model")
    masks = linear_maps(network, weight_masks(network, mask_seed))
    number = 0
    while True:
        announced = [batch_from(links.receive_object(name, BATCH), number) for name in (hospital, owner)]
        if announced[0] != announced[1]:
            raise ProtocolError("hospital and model owner announced different batches", SAME_VERSION)
        records, reveal = announced[0]
        if records == 0:
            return number
        plan = correlation_plan(network, records, reveal)
        making(network, records)
        seeds = hospital_root.derive("batch", number), owner_root.derive("batch", number)
        for _, correction in corrections_of(plan, *seeds, masks):
            links.send_tensor(owner, correction_tag(number), torch.from_numpy(correction))
        number += 1
