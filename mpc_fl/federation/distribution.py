"""The global model on its way from the aggregator to hospitals: whole for newcomers, its new parameters after every sum."""

from __future__ import annotations

import torch

from mpc_fl.aggregation.words import broadcast, next_word, say
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import (
    flatten_buffers,
    flatten_parameters,
    load_flat_buffers,
    load_flat_parameters,
)
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR


def send_model(aggregator: Aggregator, links: Links, names: tuple[str, ...]) -> None:
    """Parameters, frozen statistics and normalisation of inputs, for hospitals that begin, join, or begin anew."""

    def send(name: str) -> None:
        links.send_tensor(name, "parameters", flatten_parameters(aggregator.model))
        links.send_tensor(name, "statistics", flatten_buffers(aggregator.model))
        if aggregator.normalisation is not None:
            links.send_tensor(name, "normalisation", aggregator.normalisation.tensor())

    broadcast(names, send)


def receive_model(hospital: Hospital, links: Links, normalised: bool) -> None:
    """A hospital's side of `send_model`, so that all start bit for bit alike."""
    parameters, buffers = flatten_parameters(hospital.model), flatten_buffers(hospital.model)
    load_flat_parameters(
        hospital.model, links.receive_tensor(AGGREGATOR, "parameters", torch.float32, parameters.shape)
    )
    load_flat_buffers(hospital.model, links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape))
    if normalised:
        values = links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, None)
        hospital.normalise(Normalisation.of_tensor(values))


def send_global(links: Links, hospitals: tuple[str, ...], shared: torch.Tensor) -> None:
    """At the aggregator: the new global parameters, float32, for the hospitals of the sum they were made of."""
    say(links, hospitals, "model")
    broadcast(hospitals, lambda name: links.send_tensor(name, "global model", shared))


def receive_global(links: Links, size: int) -> torch.Tensor | None:
    """A hospital's side of `send_global`, float32 (size,); `None` when the sum is void, and all is to be made anew."""
    if next_word(links, AGGREGATOR, ("model", "void"))["word"] == "void":
        return None
    return links.receive_tensor(AGGREGATOR, "global model", torch.float32, (size,))
