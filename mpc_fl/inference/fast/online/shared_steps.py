"""What both sides of a session do with their evaluations: run several at once, open their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mpc_fl.crypto.ring import RingShare
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.errors import MpcFlError
from mpc_fl.inference.fast.network import RING_BITS, Network, Reveal, label_bits
from mpc_fl.inference.fast.online.evaluation import aligned_elements
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain, open_to


def at_once(works: Sequence[Callable[[], np.ndarray]], links: Links) -> list[np.ndarray]:
    """The results of all, each on a thread of its own; the first failure ends the waits of the others and is raised."""
    if len(works) == 1:
        return [works[0]()]

    def run(work: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return work()
        except MpcFlError as error:
            links.interrupt(error)
            raise
        except Exception as error:
            links.interrupt(MpcFlError(f"an evaluation failed with {type(error).__name__}"))
            raise

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(run, works))


def open_result(
    domain: SecretDomain, network: Network, reveal: Reveal, share: np.ndarray, hospital: str
) -> torch.Tensor | None:
    """Step 5: open a share of what `reveal` names to the hospital alone, as signed integers in float64 there."""
    bits = label_bits(network)[1] if reveal == "label" else network.values[network.output].bits
    elements = RingShare(aligned_elements(share, bits), RING_BITS - bits)
    # The record says 'label' or 'logits'.
    return open_to(domain, Shared(reveal, elements), [hospital], "diagnosis for the hospital that asked")
