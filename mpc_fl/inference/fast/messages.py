"""What the parties of a session tell each other in words: the public integer network, and which batch comes next.

The network is a JSON object, read with the suspicion that a message of another party deserves: sizes are bounded, every
option has the type of its default. Tags of messages and purposes of seeds stand here, so that all three parties spell
them alike. Nothing here is secret; shares and masked values travel as tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ModelError, ProtocolError
from mpc_fl.inference.fast.layers import KINDS, Layer
from mpc_fl.inference.fast.network import Network, Reveal, Value

SEED = "fast correlations"  # purpose of the seeds that the dealer has in common with each party
NETWORK, BATCH, STEP, READY, MASK_SEED = "network", "batch", "step", "ready", "mask seed"  # tags of messages
WEIGHTS = "masked weights"

_KINDS = {kind.__name__: kind for kind in KINDS}
_LARGEST = 1 << 28  # elements of a value or of a layer's weights
_LARGEST_BATCH = 1024
_LARGEST_SCALE = 2.0**64  # of a value, or one over it: 32 bits of any scale are finite numbers


def describe(network: Network) -> dict[str, Any]:
    """The network as JSON values."""
    return {
        "layers": [{"kind": type(layer).__name__, **dataclasses.asdict(layer)} for layer in network.layers],
        "values": {name: dataclasses.asdict(value) for name, value in network.values.items()},
        "input": network.input,
        "output": network.output,
    }


def _integers(value: Any) -> Any:
    """Lists of integers as tuples; all else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if default is None:
        return value is None or type(value) is int
    return type(value) is type(default)


def _layer(entry: dict[str, Any]) -> Layer:
    kind = _KINDS[entry["kind"]]
    options = {name: _integers(value) for name, value in entry.items() if name not in ("kind", "inputs")}
    layer = kind(inputs=tuple(str(name) for name in entry["inputs"]), **options)
    for field in dataclasses.fields(layer):
        if field.name not in ("path", "inputs", "output") and not _fits(getattr(layer, field.name), field.default):
            raise TypeError(field.name)
    shape = getattr(layer, "weight_shape", ())
    if min(shape, default=1) < 1 or math.prod(shape) > _LARGEST:
        raise ValueError("weight_shape")
    return layer


def _value(entry: dict[str, Any]) -> Value:
    shape, bits, scale = tuple(entry["shape"]), entry["bits"], float(entry["scale"])
    whole = all(type(size) is int and size > 0 for size in shape) and type(bits) is int
    possible = 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE
    if not whole or len(shape) not in (1, 3) or math.prod(shape) > _LARGEST or not possible:
        raise ValueError("value")
    return Value(shape, bits, scale)


def network_from(description: dict[str, Any]) -> Network:
    """The network that another party described. Raises `ProtocolError` for anything that is not one."""
    try:
        return Network(
            tuple(_layer(entry) for entry in description["layers"]),
            {str(name): _value(entry) for name, entry in description["values"].items()},
            str(description["input"]),
            str(description["output"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ModelError):
        raise ProtocolError("the description of the network is not valid", SAME_VERSION) from None


def network_digest(network: Network) -> str:
    """SHA-256, as hex, of the public network: what pools and the hospital's masks are bound to. Class names of `layers`
    enter it."""
    return hashlib.sha256(json.dumps(describe(network), sort_keys=True).encode()).hexdigest()


def hospital_seed(root: Seed, network: Network) -> Seed:
    """From the seed that the hospital and the dealer have in common, that of all masks for `network`.

    Each of the two derives it from the network that *it* was told. A model owner that tells them different ones would get
    corrections in which one network's masks hide what belongs to the other's, and could read the hospital's masks off
    them; so it gets corrections of masks that the hospital does not use. It costs no message.
    """
    return root.derive("network", network_digest(network))


def correction_tag(number: int) -> str:
    """Tag of the corrections of batch `number`, which come in order of use."""
    return f"correction {number}"


def batch_from(message: dict[str, Any], expected: int) -> tuple[int, Reveal]:
    """Records of an announced batch (0: the hospital is done) and what will be revealed. Raises `ProtocolError`."""
    number, records, reveal = message.get("number"), message.get("records"), message.get("reveal")
    if number != expected or type(records) is not int or not 0 <= records <= _LARGEST_BATCH:
        raise ProtocolError("a batch was announced that does not follow the last", SAME_VERSION)
    if reveal == "logits":
        return records, "logits"
    if reveal == "label":
        return records, "label"
    raise ProtocolError("a batch was announced without what to reveal", SAME_VERSION)
