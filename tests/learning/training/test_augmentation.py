"""Augmented copies: what they are, that they depend on their record alone, and that a patient counts with their mean, clipped."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.training import AugmentationSection
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, SecrecyError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.training import batch_pieces
from mpc_fl.learning.training.augmentation import (
    AugmentedRecords,
    augmented,
    copies_of,
    draw_transformations,
    transformed,
    unchanged,
)
from mpc_fl.learning.training.dp_sgd import LocalRound, LocalTraining, train_locally
from mpc_fl.learning.training.per_sample_gradients import Method, clipped_sum, sum_cross_entropy, working_copy

torch.set_num_threads(1)
KEY = bytes(range(32))
ALL = AugmentationSection(copies=4, flip=True, shift=0.2, rotation=20, scale=0.2, contrast=0.3)


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def images(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *(shape or (1, 12, 12)), generator=torch.Generator().manual_seed(seed))


# ---- what copies are ---------------------------------------------------------------------------------------------------


def test_nothing_is_drawn_and_records_stay_without_augmentation() -> None:
    records, seed = images(3), Seed(KEY)
    assert augmented(AugmentationSection(), records, seed) is records
    assert copies_of(records).shape == (3, 1, 1, 12, 12)


def test_unchanged_copies_are_the_images() -> None:
    records = images(3, 2, 16, 16)
    copies = transformed(records, unchanged(3, 2))
    torch.testing.assert_close(copies, records.unsqueeze(1).expand(3, 2, 2, 16, 16), rtol=0, atol=1e-6)


def only(**settings: float | bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """64 copies of one image under a single kind of change: the image, the copies, their transformations."""
    section, record = AugmentationSection(copies=64, **settings), images(1, 1, 20, 20)  # type: ignore[arg-type]
    drawn = draw_transformations(section, record, Seed(KEY))
    return record[0], transformed(record, drawn)[0], drawn[0]


def test_about_half_of_the_copies_are_mirrored() -> None:
    record, copies, _ = only(flip=True)
    mirrored = [torch.allclose(copy, record.flip(2), atol=1e-5) for copy in copies]
    as_it_is = [torch.allclose(copy, record, atol=1e-5) for copy in copies]
    assert sum(mirrored) + sum(as_it_is) == 64
    assert 10 < sum(mirrored) < 54  # of the fixed key


def test_shifts_turns_and_scales_stay_within_their_bounds_and_come_close() -> None:
    _, _, drawn = only(shift=0.1)
    shifts = drawn[:, [2, 5]].abs() / 2  # coordinates go from -1 to 1
    assert float(shifts.max()) <= 0.1 and float(shifts.max()) > 0.08
    _, _, drawn = only(rotation=30)
    angles = torch.rad2deg(torch.atan2(drawn[:, 3], drawn[:, 4]))
    assert float(angles.abs().max()) <= 30.001 and float(angles.max()) > 24 and float(angles.min()) < -24
    _, _, drawn = only(scale=0.25)
    scales = 1 / drawn[:, 0]
    assert 0.75 <= float(scales.min()) < 0.8 and 1.2 < float(scales.max()) <= 1.2501


def test_a_shift_by_a_whole_pixel_moves_the_image_and_the_border_goes_on() -> None:
    record = images(1, 1, 10, 10)
    by_one = unchanged(1, 1).clone()
    by_one[0, 0, 2] = 2 / 10
    copy = transformed(record, by_one)[0, 0, 0]
    torch.testing.assert_close(copy[:, :-1], record[0, 0, :, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(copy[:, -1], record[0, 0, :, -1], rtol=0, atol=1e-5)


def test_a_quarter_turn_is_one() -> None:
    record = images(1, 1, 9, 9)
    quarter = torch.tensor([[[0.0, -1, 0, 1, 0, 0, 1]]])
    torch.testing.assert_close(transformed(record, quarter)[0, 0], record[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)


def test_contrast_keeps_the_mean_and_spreads_the_rest() -> None:
    record, copies, drawn = only(contrast=0.5)
    for copy, factor in zip(copies, drawn[:, 6], strict=True):
        torch.testing.assert_close(copy, (record - record.mean()) * factor + record.mean(), rtol=0, atol=1e-5)
    assert 0.5 <= float(drawn[:, 6].min()) < 0.6 and 1.4 < float(drawn[:, 6].max()) <= 1.5


# ---- on what they depend -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12), st.integers(0, 100))
def test_copies_depend_on_their_record_alone(rows: list[int], seed: int) -> None:
    """Bit for bit, whoever else is there, in whatever order, however often."""
    records = images(12, seed=seed)
    alone = [copies_of(augmented(ALL, records[row : row + 1], Seed(KEY)))[0] for row in range(12)]
    together = copies_of(augmented(ALL, records[torch.tensor(rows)], Seed(KEY)))
    assert torch.equal(together, torch.stack([alone[row] for row in rows]))


def test_every_record_step_and_copy_has_its_own() -> None:
    records, seed = images(2), Seed(KEY)
    first, second = (draw_transformations(ALL, records, seed.derive("augmentation", 1, step)) for step in (0, 1))
    rows = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    assert len(rows.unique(dim=0)) == len(rows) == 16
    with pytest.raises(SecrecyError):
        seed.derive("augmentation", 1, 0)


# ---- gradients ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    config = Config().with_values(model={"architecture": "small_cnn", "normalisation": "group"})
    return working_copy(build_model(config, input_shape=(1, 12, 12), seed=2).double())


def mean_gradients(model: nn.Module, inputs: AugmentedRecords, labels: torch.Tensor) -> list[torch.Tensor]:
    """Of each record, one backward pass for every copy."""
    found = []
    for copies, label in zip(copies_of(inputs), labels, strict=True):
        gradients = []
        for copy in copies:
            value = sum_cross_entropy(model(copy.unsqueeze(0)), label.unsqueeze(0))
            gradient = torch.autograd.grad(value, list(model.parameters()))
            gradients.append(torch.cat([part.reshape(-1) for part in gradient]))
        found.append(torch.stack(gradients).mean(dim=0))
    return found


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000), st.floats(0.1, 10))
def test_all_methods_clip_the_mean_over_copies(count: int, copies: int, seed: int, norm: float) -> None:
    """In float64, as without augmentation: else rounding puts activations on the other side of a ReLU's kink."""
    model, records = network(), images(count, seed=seed).double()
    labels = torch.arange(count) % 3
    section = ALL.model_copy(update={"copies": copies})
    drawn = draw_transformations(section, records, Seed(KEY)).double()
    inputs = AugmentedRecords(records, drawn)
    means = mean_gradients(model, inputs, labels)
    expected = functools.reduce(torch.add, [mean * min(1.0, norm / float(mean.norm())) for mean in means])
    for method in ("loop", "vmap", "hooks"):
        result = clipped_sum(model, sum_cross_entropy, inputs, labels, norm, method)
        found = torch.cat([part.reshape(-1) for part in result.gradients])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * norm * count)
        torch.testing.assert_close(result.norms.double(), torch.stack([m.norm() for m in means]), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_more_copies_than_go_at_once_make_the_same_mean(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, labels = network(), images(3).double(), torch.arange(3)
    section = ALL.model_copy(update={"copies": 7})
    inputs = AugmentedRecords(records, draw_transformations(section, records, Seed(KEY)).double())
    whole = clipped_sum(model, sum_cross_entropy, inputs, labels, 1.0, method)
    monkeypatch.setattr(batch_pieces, "_RECORD_BYTES", 3 * 4 * 144)  # three copies
    cut = clipped_sum(model, sum_cross_entropy, inputs, labels, 1.0, method)
    for one, other in zip(whole.gradients, cut.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.losses, cut.losses)


# ---- training ----------------------------------------------------------------------------------------------------------


def trained(mechanism: str, **augmentation: object) -> LocalRound:
    config = Config().with_values(
        data={"image_size": 12},
        model={"normalisation": "group"},
        training={"local_steps": 2, "per_sample_gradients": "loop", "augmentation": augmentation},
        privacy={"mechanism": mechanism},
    )
    records = Records(images(6), torch.arange(6) % 3, list(torch.arange(6).split(1)))
    noise = None if mechanism == "none" else 1e-9
    training = LocalTraining(config, noise, 1.0, Seed(KEY))
    return train_locally(build_model(config, seed=1), records, training, 1, Seed(bytes(32)))


@pytest.mark.parametrize("mechanism", ["local", "none"])
def test_training_augments_and_repeats_from_the_same_seed(mechanism: str) -> None:
    plain, first = trained(mechanism), trained(mechanism, copies=3, flip=True, shift=0.1)
    again = trained(mechanism, copies=3, flip=True, shift=0.1)
    assert torch.equal(first.update, again.update)
    assert not torch.allclose(first.update, plain.update, rtol=1e-2)
    assert first.records_used == plain.records_used == 12, "a patient counts once, whatever the copies"
    assert len(flatten_parameters(build_model(Config(), seed=1))) > 0


# ---- configuration -----------------------------------------------------------------------------------------------------


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="alike"):
        Config().with_values(training={"augmentation": {"copies": 4}})
    table = {"source": "csv", "table": {"features": 4}}
    with pytest.raises(ConfigError, match="images"):
        Config().with_values(data=table, model={"architecture": "mlp"}, training={"augmentation": {"flip": True}})
    with pytest.raises(ConfigError, match="images"):
        Config().with_values(
            data={"features": {"extractor": "scattering"}},
            model={"architecture": "linear"},
            training={"augmentation": {"shift": 0.1}},
        )
