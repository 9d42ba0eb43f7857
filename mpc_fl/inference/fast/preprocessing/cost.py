"""What an evaluation costs, from the public network alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpc_fl.inference.fast.kernels.bit_planes import packed_bytes
from mpc_fl.inference.fast.network import Network, Reveal
from mpc_fl.inference.fast.preprocessing.correlations import CorrelationPlan, correlation_plan, level_name
from mpc_fl.inference.fast.preprocessing.gate_correlation import ComparisonGate


@dataclass
class MessageChain:
    """The longest chain of sequential messages that reached C and S so far."""

    hospital: int = 0
    owner: int = 0

    def from_hospital(self) -> None:
        """C sent, S waits for it."""
        self.owner = max(self.owner, self.hospital + 1)

    def both(self) -> None:
        """Both sent at the same time, both wait."""
        self.hospital, self.owner = max(self.hospital, self.owner + 1), max(self.owner, self.hospital + 1)

    @property
    def length(self) -> int:
        """Messages in sequence until now."""
        return max(self.hospital, self.owner)


@dataclass(frozen=True)
class Cost:
    """For one batch. Bytes are payload; frames add about 60 each. `sequential_messages` includes the result's."""

    gates: int
    bytes_from_hospital: int
    bytes_from_owner: int
    correction_bytes: int
    sequential_messages: int
    masked_weight_bytes: int


def cost_of(network: Network, records: int, reveal: Reveal = "logits") -> Cost:
    """Cost of one batch of `records` records; `masked_weight_bytes` are sent once per model."""
    plan = correlation_plan(network, records, reveal)
    gates = [piece for piece in plan.pieces.values() if isinstance(piece, ComparisonGate)]
    openings = sum(
        packed_bytes(gate.bits, gate.count) + 8 * (gate.masks + len(gate.thresholds)) * gate.words for gate in gates
    )
    masked = sum(plan.masked_bytes(name) for name in plan.masks)
    results = records * (4 if reveal == "label" else 4 * network.values[network.output].elements)
    return Cost(
        gates=sum(gate.count for gate in gates),
        bytes_from_hospital=masked + openings,
        bytes_from_owner=openings + results,
        correction_bytes=plan.correction_bytes,
        sequential_messages=_chain(network, plan).length + 1,
        masked_weight_bytes=4 * sum(math.prod(layer.weight_shape) for layer in network.linear_layers),
    )


def multiply_adds(network: Network) -> int:
    """Multiplications of a secret activation with a secret weight in the linear layers, for one record."""
    outputs = {layer.output: network.values[layer.output].elements for layer in network.linear_layers}
    return sum(outputs[layer.output] * math.prod(layer.weight_shape[1:]) for layer in network.linear_layers)


def _chain(network: Network, plan: CorrelationPlan) -> MessageChain:
    """Walk the network as both parties do."""
    chain = MessageChain()

    def compare(name: str) -> None:
        levels = (name, *(level_name(name, level) for level in range(len(plan.pieces))))
        for level in levels:
            piece = plan.pieces.get(level)
            for _ in range(piece.openings if isinstance(piece, ComparisonGate) else 0):
                chain.both()

    if network.input in plan.masks:
        chain.from_hospital()
    for layer in network.layers:
        compare(layer.output)
        if layer.output in plan.masks:
            chain.from_hospital()
    compare("label")
    return chain
