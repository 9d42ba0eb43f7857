"""What a run will cost, as it is said before the run: results of `apps.runs.estimate`, read by `mpc-fl check | estimate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.config.config import Config, relays_of


@dataclass(frozen=True)
class NoPrivacy:
    """Of the patients of a hospital that adds no noise."""

    hospital: str
    patients: int
    epsilon: None = None
    noise_multiplier: None = None


@dataclass(frozen=True)
class PlannedPrivacy:
    """What the patients of a hospital will have spent when all rounds are done, `epsilon` of `target_epsilon`.

    `epsilon_with_spare`: if as many rounds are lost and made anew as `privacy.spare_rounds` allows.
    """

    hospital: str
    patients: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    epsilon: float
    epsilon_with_spare: float
    target_epsilon: float
    delta: float


@dataclass(frozen=True)
class TrainingEstimate:
    """Of a training run. Bytes and messages are those of the whole run, memory is the peak of the largest hospital.

    `connecting_seconds` until all parties are connected, started at once: on this machine, or each on its own where they have
    addresses; `connecting_deadline` ends the wait for those that are not there.

    `bytes_relayed`: what relays pass on together, among peers that can only dial out; all of it through one where others are lost.

    Of one sum of updates or gradients (`aggregation.mask_costs`): with how many others a hospital shares masks, how many keys
    it holds, how many hospitals may pool with the aggregator; seconds of a core to mask a summand, and to open the sum when as
    many are lost as the quorum allows.
    """

    parameters: int
    rounds: int
    connecting_seconds: float
    connecting_deadline: float
    bytes_sent_per_hospital: int
    bytes_sent_by_aggregator: int
    bytes_relayed: int
    messages_per_hospital: int
    mask_neighbours: int
    mask_keys: int
    masks_against: int
    masking_seconds: float
    opening_seconds: float
    headroom_bits_spare: float
    memory_bytes_per_hospital: int
    privacy: list[NoPrivacy | PlannedPrivacy]

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


def relaying(config: Config, found: TrainingEstimate, size: Callable[[int], str]) -> str | None:
    """What relays pass on among hospitals, and what losing one costs; None where nothing is relayed. `size` puts bytes in words."""
    relays = relays_of(config)
    if not found.bytes_relayed:
        return None
    shown = ", ".join(map(config.federation.chosen_names.shown, relays))
    alone = "; there is one alone, and without it those that only dial out lose each other" if len(relays) == 1 else ""
    return f"relays ({shown}) pass on {size(found.bytes_relayed)} in all, which they cannot read{alone}"


@dataclass(frozen=True)
class FastInferenceEstimate:
    """Of one batch of encrypted diagnosis with the engine `fast`; `rounds` are messages that wait for each other.

    `bytes_per_party` is the larger way between hospital and model owner; the dealer sends to the model owner.
    """

    batch: int
    layers: int
    comparisons: int
    multiplications: int
    bytes_per_party: int
    bytes_from_hospital: int
    bytes_from_model_owner: int
    masked_weight_bytes: int
    rounds: int
    bytes_sent_by_dealer: int
    memory_bytes_per_party: int

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ReferenceInferenceEstimate:
    """Of one batch of encrypted diagnosis with the engine `reference`; `bytes_per_party` go each way."""

    batch: int
    layers: int
    comparisons: int
    multiplications: int
    bytes_per_party: int
    rounds: int
    truncations: int
    opened_weights: int
    bytes_sent_by_dealer: int
    memory_bytes_per_party: int

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


InferenceEstimate = FastInferenceEstimate | ReferenceInferenceEstimate
