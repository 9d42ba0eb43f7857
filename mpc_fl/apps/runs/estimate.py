"""What a run will need, before it: headroom, privacy, bytes, messages, memory.

Bytes are those of tensors, and beyond 16 hospitals of commitments, confirmations and names of every sum
(`aggregation.mask_costs`); frames and control messages add about 100 bytes each, signatures of the reveal ledger and
greetings about 1.5 KB. Memory is a model of what the programs hold, with constants fitted to measured peaks (`VmHWM` of
parties, in their logs): right within a factor of two, for a decision between a laptop and a server. Parties on one machine are
forked from one process, and need what that has imported once.

An engine is imported when its cost is asked for: a run of training, which is estimated before it starts, needs neither.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mpc_fl.aggregation.mask_costs import mask_costs
from mpc_fl.aggregation.norm_costs import CheckCosts, costs_among_peers, costs_with_aggregator
from mpc_fl.aggregation.norm_plan import check_of
from mpc_fl.apps.estimates import (
    FastInferenceEstimate,
    InferenceEstimate,
    NoPrivacy,
    PlannedPrivacy,
    ReferenceInferenceEstimate,
    TrainingEstimate,
)
from mpc_fl.apps.runs.party_starter import modules_to_share
from mpc_fl.config.config import Config, connect_seconds
from mpc_fl.config.evaluation import Evaluated
from mpc_fl.config.protocols import MASKS_BETWEEN_ALL_UP_TO
from mpc_fl.errors import ModelError
from mpc_fl.federation.feature_statistics import plan_features
from mpc_fl.federation.global_model import initial_model
from mpc_fl.federation.group_evaluation import plan_groups
from mpc_fl.federation.noised_calibration import plan_calibration
from mpc_fl.federation.noised_evaluation import plan_noised_evaluation
from mpc_fl.federation.planning import (
    headroom_of,
    mechanism_of,
    peer_rules,
    plan_release,
    releases_beside_steps,
    sum_rules,
)
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.evaluation import EVALUATION_CHUNK, evaluation_length
from mpc_fl.learning.models.parameters import flatten_buffers, flatten_parameters, shared_coordinates
from mpc_fl.learning.models.splitting import split_before_trained
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.models.weight_standardisation import plain_network
from mpc_fl.learning.privacy.accounting import epsilon_of
from mpc_fl.learning.training.batch_pieces import copies_at_once
from mpc_fl.learning.training.frozen_part import LARGEST_BYTES, kept_bytes
from mpc_fl.roles import hospital_name, is_hospital
from mpc_fl.sharing.closed_sum import KEY_BYTES

_WORD = 8
_FLOAT = 4
# Fitted: an idle party, and what of that is its own where parties are forked from one process (measured: 32 to 80 MB); words per
# element of the widest layer that a comparison on shares holds.
_IDLE_BYTES = 460 << 20
_IDLE_BYTES_OF_ITS_OWN = 100 << 20
_IDLE_BYTES_OF_FAST = 250 << 20  # without CrypTen and what comes with it
_COMPARISON_WORDS = 48
# Among peers, to each other hospital: bytes for each one that is in a sum (combinations of its slices, signatures that are
# repeated) or in a round (what it said of itself, its signatures); messages of a sum (transcript, slice twice, confirmation,
# total twice, coin, combinations, what was heard, keys) and of a round (presence, a signature over its proposal, two of its block).
_SAID_OF_SLICES = 1800
_SAID_OF_A_ROUND = 1200
_MESSAGES_OF_A_PEER_SUM = 10
_MESSAGES_OF_A_PEER_ROUND = 4
_MASK_BYTES_A_SECOND = 3e9  # of key stream onto a summand, one core: measured 2.8 to 4.5, benchmarks/many_hospitals.py
_LINK_SECONDS = 0.012  # of processor time at both ends together, `benchmarks/connecting.py`
_HELD_OF_CORRECTIONS = 2.9  # engine fast: bytes held at the model owner per byte of corrections


class _Activations(NamedTuple):
    """Elements that one record makes in a network: of all layers together, and of the widest layer; the shape of its output."""

    all: int
    widest: int
    output: tuple[int, ...]


def _activations(model: nn.Module, input_shape: tuple[int, ...]) -> _Activations:
    """By a pass on a shape without elements. Raises `ModelError` when the network does not take such a record."""
    sizes: list[int] = []

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        sizes.extend(value.numel() for value in outputs if isinstance(value, torch.Tensor))

    shapes = copy.deepcopy(model).to("meta")
    for module in shapes.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    try:
        with torch.no_grad():
            output = shapes(torch.empty(1, *input_shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        size = "x".join(map(str, input_shape))
        raise ModelError(
            f"the network does not take records of shape {size}", "set data.image_size to what it takes"
        ) from None
    return _Activations(sum(sizes), max(sizes, default=output.numel()), tuple(output.shape[1:]))


class _Steps(NamedTuple):
    """What steps pass through: elements that a record of `shape` makes in it, and bytes kept of the records before."""

    all: int
    shape: tuple[int, ...]
    kept: int = 0


def _of_steps(config: Config, model: nn.Module, patients: int) -> _Steps:
    """The whole network, or its trained part where what that reads is computed once (`training.frozen_part`)."""
    shape = config.data.input_shape
    parts = split_before_trained(model) if config.training.computes_frozen_part_once else None
    if parts is not None:
        read = _activations(parts[0], shape).output
        kept = kept_bytes(read, patients)
        if kept <= LARGEST_BYTES:
            return _Steps(_activations(parts[1], read).all, read, kept)
    return _Steps(_activations(model, shape).all, shape)


def estimate_training(config: Config, patients: list[int], at: str | None = None) -> TrainingEstimate:
    """Bytes, messages, privacy, headroom and memory of a training run, `patients[i]` training patients at hospital i, or those
    of the one hospital `at`.

    Raises `ModelError` for a network that does not take such records, and what `plan_release` and `norm_plan.check_of` raise.
    """
    model = set_trainable(build_model(config), config.training.trainable)
    parameters, buffers = len(flatten_parameters(model)), len(flatten_buffers(model))
    classes, rounds = len(config.data.classes), config.training.rounds
    shared = int(shared_coordinates(model, config.training.local_normalisation).sum())
    hospitals, headroom = config.federation.hospitals, headroom_of(config)
    evaluations = _evaluations(config, classes)
    # An update or gradient up and a model down, once per round or, with distributed noise, once per step.
    sums, ring_bits = 1, headroom.ring_bits
    if config.privacy.mechanism == "distributed":
        sums, ring_bits = config.training.local_steps, mechanism_of(config).ring_bits
    before = [_WORD] if config.counts_patients else []
    if config.data.normalise == "secure":
        before.append(_WORD * plan_features(config).length)
    opened = len(before) + rounds * sums + len(evaluations)
    rules = (peer_rules if config.among_peers else sum_rules)(config)
    closing = min(rules.closing, hospitals - 1)
    keys, told = KEY_BYTES * 2 * closing, 0
    masks = mask_costs(rules, hospitals)
    if hospitals > MASKS_BETWEEN_ALL_UP_TO and not config.among_peers:
        keys, told = masks.bytes_sent, masks.bytes_received + masks.bytes_of_names
    of_update = mask_costs(replace(rules, colluders=None), hospitals) if config.aggregation.norm_check else masks
    masking = ring_bits // 8 * shared / _MASK_BYTES_A_SECOND
    messages = 4 if closing else 2  # ready and summand; signature and keys with closing masks
    summands = sum(before) + rounds * sums * ring_bits // 8 * shared + _WORD * sum(evaluations)
    up = summands + opened * keys
    down = _FLOAT * (parameters + buffers) + rounds * sums * _FLOAT * shared
    down += opened * told
    down += _FLOAT * shared if config.evaluation.choose == "best" else 0
    signed = (
        config.last_round + 5
    )  # certificate, state of the ledger, start, evaluation before round 1, each round, end
    sent = 1 + messages * opened + signed  # it announces itself
    if config.among_peers:  # slices, then totals, and to each other hospital keys and what is said of them
        others, down = hospitals - 1, 0
        said = opened * _SAID_OF_SLICES + (config.last_round + 2) * _SAID_OF_A_ROUND
        up = 2 * summands * others // hospitals + others * (opened * keys + hospitals * said)
        sent = others * (1 + _MESSAGES_OF_A_PEER_SUM * opened + _MESSAGES_OF_A_PEER_ROUND * (config.last_round + 3))
    if (check := _check_costs(config, shared, ring_bits // 8 * shared, patients)) is not None:
        up, sent = up + rounds * sums * check.bytes_sent, sent + rounds * sums * check.messages
    return TrainingEstimate(
        parameters=parameters,
        rounds=rounds,
        connecting_seconds=_connecting(config),
        connecting_deadline=round(connect_seconds(config), 1),
        bytes_sent_per_hospital=up,
        bytes_sent_by_aggregator=hospitals * down,
        bytes_relayed=relayed_pairs(config) * 2 * up // (hospitals - 1) if config.among_peers else 0,
        messages_per_hospital=sent,
        mask_neighbours=of_update.neighbours,
        mask_keys=of_update.keys,
        masks_against=of_update.against,
        masking_seconds=round(of_update.streams * masking, 3),
        opening_seconds=round(of_update.opener_streams_at_quorum * masking, 3),
        headroom_bits_spare=round(headroom.bits_spare, 1),
        memory_bytes_per_hospital=_training_memory(config, model, parameters, max(patients)),
        privacy=[planned_privacy(config, at or hospital_name(rank), count) for rank, count in enumerate(patients)],
    )


def _check_costs(config: Config, shared: int, summand_bytes: int, patients: list[int]) -> CheckCosts | None:
    """Of the norm check of one sum of updates or gradients; `None` where none is asked for."""
    mechanism = mechanism_of(config) if config.privacy.mechanism == "distributed" else None
    hospitals = config.federation.hospitals
    weights = sum(patients) if config.counts_patients else hospitals
    check = check_of(config, headroom_of(config), mechanism, shared, 1 << (weights - 1).bit_length())
    if check is None:
        return None
    if config.among_peers:
        return costs_among_peers(check.test, hospitals, summand_bytes)
    return costs_with_aggregator(check.test, hospitals)


def _evaluations(config: Config, classes: int) -> list[int]:
    """Elements of every sum of evaluation and calibration that a run opens, at most: groups may be withheld."""
    found = list[int]()
    of: tuple[Evaluated, ...] = ("test", "validation")
    for whom in of:
        noised = plan_noised_evaluation(config, whom)
        counts = evaluation_length(classes) if noised is None else noised.length
        found += [counts] * sum(config.evaluates(number, whom) for number in range(config.last_round + 1))
    calibration, groups = plan_calibration(config), plan_groups(config)
    found += [] if calibration is None else [calibration.grid.length]
    return found if groups is None else [*found, groups.length, groups.counts_length(groups.cells)]


def relayed_pairs(config: Config) -> int:
    """How many pairs of hospitals can both only dial out, and reach each other through relays."""
    behind = sum(is_hospital(name) for name in config.federation.dial_out_only)
    return behind * (behind - 1) // 2


def _connecting(config: Config) -> float:
    """Seconds until all are connected: what their links take of this machine's cores, or of a machine of its own each."""
    parties = _training_parties(config)
    if config.federation.addresses:
        return round(_LINK_SECONDS * (parties - 1) / 2, 2)
    return round(_LINK_SECONDS * parties * (parties - 1) / 2 / (os.cpu_count() or 1), 2)


def _training_memory(config: Config, model: nn.Module, parameters: int, patients: int) -> int:
    """Peak bytes of the largest hospital, at one record per patient: while it evaluates, trains or aggregates."""
    layers = _activations(model, config.data.input_shape)
    data = config.data
    shape = data.input_shape if data.features is None else (data.channels, data.image_size, data.image_size)
    records = 2 * patients * torch.Size(shape).numel()  # read one by one, then stacked
    evaluating = 3 * EVALUATION_CHUNK * layers.widest
    method = config.training.per_sample_gradients
    # Large networks are measured to be fastest in the loop, which holds one gradient.
    one_by_one = method == "loop" or (method == "auto" and parameters > 1_000_000)
    batch, factor = min(config.training.batch_size, patients), 5
    together = 1 if one_by_one else batch
    if config.privacy.mechanism == "none":
        together, factor, gradients = batch, 2, 0
    else:
        # Gradients of single records are held for a chunk of at most 1 GB (`per_sample_gradients`).
        gradients = min(together * parameters, max(parameters, (1 << 30) // _FLOAT))
    steps = _of_steps(config, model, patients)
    in_network = min(together * config.training.augmentation.copies, copies_at_once(steps.shape))
    training = gradients + factor * steps.all * in_network
    weights = 5 * parameters  # global, working copy, gradient, momentum, update
    shares = 4 * parameters * _WORD // _FLOAT  # encoded, mask, share, message
    return _IDLE_BYTES + steps.kept + _FLOAT * (records + weights + max(evaluating, training, shares))


def planned_privacy(config: Config, name: str, patients: int) -> NoPrivacy | PlannedPrivacy:
    """What a whole run spends of the privacy of a hospital's patients whose ledger holds nothing yet.

    But for `patients` in it all follows from public values. Raises what `plan_release` raises.
    """
    planned = plan_release(config, patients, [], name)
    if planned is None:
        return NoPrivacy(name, patients)
    steps, settings = config.training.rounds * config.training.local_steps, config.privacy
    without_loss = releases_beside_steps(config.with_values(privacy={"spare_rounds": 0}))
    events = [*without_loss, replace(planned, steps=steps)]
    return PlannedPrivacy(
        hospital=name,
        patients=patients,
        sampling_rate=planned.sample_rate,
        steps=steps,
        noise_multiplier=planned.noise_multiplier,
        epsilon=epsilon_of(events, settings.delta, settings.accountant),
        epsilon_with_spare=epsilon_of([*releases_beside_steps(config), planned], settings.delta, settings.accountant),
        target_epsilon=settings.epsilon,
        delta=settings.delta,
    )


def _training_parties(config: Config) -> int:
    """Hospitals, and the aggregator where there is one."""
    return config.federation.hospitals + (0 if config.among_peers else 1)


def parties_here(config: Config) -> int:
    """How many parties of a training run are on this machine: all, or one where they have addresses."""
    return 1 if config.federation.addresses else _training_parties(config)


def memory_here(config: Config, bytes_per_hospital: int) -> int:
    """Bytes that the parties of a training run on this machine need together (`parties_here`)."""
    if config.federation.addresses:
        return bytes_per_hospital
    parties = parties_here(config)
    if not modules_to_share(config):
        return parties * bytes_per_hospital
    return _IDLE_BYTES + parties * (bytes_per_hospital - _IDLE_BYTES + _IDLE_BYTES_OF_ITS_OWN)


def available_memory() -> int | None:
    """Bytes of memory this machine can still give, `None` where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def estimate_inference(config: Config) -> InferenceEstimate:
    """Bytes, rounds, comparisons and memory of one batch of encrypted inference with the configured engine.

    Raises `UnsupportedLayerError` for what the engine does not run.
    """
    return _fast_inference(config) if config.inference.engine == "fast" else _reference_inference(config)


def _fast_inference(config: Config) -> FastInferenceEstimate:
    """With first random weights and ranges of phantoms: a trained model's widths differ by a few bits."""
    from mpc_fl.inference.fast.preprocessing.cost import cost_of, multiply_adds
    from mpc_fl.inference.fast.quantization.calibration import calibrate

    size, reveal = config.inference.batch_size, config.reveal
    records = _public_records(config)
    network = calibrate(plain_network(initial_model(config)), records).network
    found = cost_of(network, size, reveal)
    held = _HELD_OF_CORRECTIONS * config.inference.at_once * found.correction_bytes
    return FastInferenceEstimate(
        batch=size,
        layers=len(network.layers),
        comparisons=found.gates,
        multiplications=size * multiply_adds(network),
        bytes_per_party=max(found.bytes_from_hospital, found.bytes_from_owner),
        bytes_from_hospital=found.bytes_from_hospital,
        bytes_from_model_owner=found.bytes_from_owner,
        masked_weight_bytes=found.masked_weight_bytes,
        rounds=found.sequential_messages,
        bytes_sent_by_dealer=found.correction_bytes,
        memory_bytes_per_party=_IDLE_BYTES_OF_FAST + 2 * found.masked_weight_bytes + int(held),
    )


def _public_records(config: Config) -> torch.Tensor:
    """Public records of the right shape, float32: what bytes depend on is a matter of shapes but for a few bits."""
    if len(config.data.input_shape) == 1:
        columns = torch.linspace(-1.0, 1.0, config.data.input_shape[0])
        return torch.stack([columns, -columns])
    return public_phantoms(2, config)


def _reference_inference(config: Config) -> ReferenceInferenceEstimate:
    from mpc_fl.inference.reference.diagnosis import public_graph, requests_of
    from mpc_fl.inference.reference.network import cost

    shape = (config.inference.batch_size, *config.data.input_shape)
    with torch.no_grad():
        graph = public_graph(config)
        model = build_model(config)
    corrections = _WORD * sum(r.elements for r in requests_of(graph, shape, 2, config.inference.fraction_bits))
    weights = len(flatten_parameters(model)) * (2 * _FLOAT + 2 * _WORD)
    comparing = config.inference.batch_size * _activations(model, config.data.input_shape).widest * _COMPARISON_WORDS
    ahead = min(corrections, config.runtime.dealer_ahead_bytes)
    return ReferenceInferenceEstimate(
        batch=config.inference.batch_size,
        layers=len(graph.layers),
        **cost(graph, shape),
        bytes_sent_by_dealer=corrections,
        memory_bytes_per_party=_IDLE_BYTES + weights + _WORD * comparing + ahead,
    )
