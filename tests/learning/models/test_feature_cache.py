"""Features on the hospital's disk: sealed, found again for the same image alone, and computed anew where anything is wrong."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, DataError, IdentityError
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models import feature_cache, feature_extractor
from mpc_fl.learning.models.feature_cache import (
    KEY_FILE,
    CachedValues,
    FeatureCache,
    about_features,
    make_simulation_key,
    open_feature_cache,
    settings_digest,
)
from mpc_fl.learning.models.feature_extractor import as_records

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
IMAGES = torch.arange(5 * 4, dtype=torch.float32).reshape(5, 1, 2, 2) / 20


def configured(cache: Path | str = "memory", **features: Any) -> Config:
    values = {
        "data": {
            "image_size": 64,
            "phantoms": {"train_patients": 9, "test_patients": 3},
            "features": {"extractor": "scattering", **features},
        },
        "model": {"architecture": "linear"},
        "site": {"feature_cache": str(cache)},
    }
    return parse_config(values, "test")


class Computing:
    """Records that the image alone decides, and how many were computed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.count += len(images)
        size = configured().data.input_shape[0]
        return torch.stack([torch.linspace(float(image.sum()), 1.0, size) for image in images])


def opened(directory: Path, key: bytes = KEY, config: Config | None = None, **limits: int) -> CachedValues:
    return of_features(FeatureCache(directory, Seed(key), **limits), config)


def of_features(cache: FeatureCache, config: Config | None = None) -> CachedValues:
    config = config or configured()
    return cache.values_of(settings_digest(config), config.data.input_shape)


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.sealed"))


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    records = opened(tmp_path).records(IMAGES, Computing())
    assert len(entries(tmp_path)) == 5
    return tmp_path, records


def test_what_was_computed_once_is_read_bit_for_bit(filled: tuple[Path, torch.Tensor]) -> None:
    directory, records = filled
    computing, seen = Computing(), list[tuple[int, int]]()
    again = opened(directory).records(IMAGES, computing, lambda done, of: seen.append((done, of)))
    assert computing.count == 0 and torch.equal(again, records)
    assert torch.equal(records, Computing()(IMAGES))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_the_same_image_twice_is_one_entry(tmp_path: Path) -> None:
    computing = Computing()
    records = opened(tmp_path).records(IMAGES[[0, 1, 0]], computing)
    assert computing.count == 2 and torch.equal(records[0], records[2]) and len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"key": OTHER_KEY},
        lambda _: {"config": configured(mirror=False)},
    ],
    ids=["another key", "another setting"],
)
def test_another_key_or_setting_finds_nothing(
    filled: tuple[Path, torch.Tensor], change: Callable[[Any], dict[str, Any]]
) -> None:
    directory, computing = filled[0], Computing()
    opened(directory, **change(None)).records(IMAGES, computing)
    assert computing.count == 5 and len(entries(directory)) == 10


def test_another_image_has_another_entry_also_by_one_bit_or_by_its_shape(filled: tuple[Path, torch.Tensor]) -> None:
    directory, computing = filled[0], Computing()
    changed = IMAGES.clone()
    changed.view(torch.int32)[2, 0, 1, 1] += 1
    opened(directory).records(changed, computing)
    assert computing.count == 1
    opened(directory).records(IMAGES.reshape(5, 1, 1, 4), computing)
    assert computing.count == 6


def test_nothing_of_a_record_or_an_image_is_on_the_disk_as_it_is(filled: tuple[Path, torch.Tensor]) -> None:
    directory, records = filled
    everything = b"".join(path.name.encode() + path.read_bytes() for path in directory.rglob("*") if path.is_file())
    for row, image in zip(records, IMAGES, strict=True):
        assert row[1:5].numpy().tobytes() not in everything
        assert image.numpy().tobytes() not in everything
    # Without the key nobody can tell which image an entry is of.
    assert not any(hashlib.sha256(image.numpy().tobytes()).hexdigest().encode() in everything for image in IMAGES)


def damage(path: Path, how: str, other: Path) -> None:
    content = path.read_bytes()
    changed = {
        "a flipped bit": content[:-30] + bytes([content[-30] ^ 1]) + content[-29:],
        "a flipped bit of the header": bytes([content[0] ^ 1]) + content[1:],
        "cut off": content[:-1],
        "empty": b"",
        "longer": content + b"\0",
        "that of another image": other.read_bytes(),
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize(
    "how",
    [
        *("a flipped bit", "a flipped bit of the header", "cut off", "empty", "longer"),
        "that of another image",
    ],
)
def test_a_damaged_entry_is_computed_anew_and_said(
    filled: tuple[Path, torch.Tensor], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory, records = filled
    first, second, *_ = entries(directory)
    damage(first, how, second)
    computing = Computing()
    with caplog.at_level(logging.INFO, "mpc_fl"):
        assert torch.equal(opened(directory).records(IMAGES, computing), records)
    assert computing.count == 1
    assert f"1 entries of the feature cache {directory} were damaged: computed anew" in caplog.messages
    assert f"features of 4 of 5 images are of the cache {directory}" in caplog.messages
    healed = Computing()
    opened(directory).records(IMAGES, healed)
    assert healed.count == 0


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache, "seal", full)
    computing = Computing()
    with caplog.at_level(logging.WARNING, "mpc_fl"):
        records = opened(tmp_path).records(IMAGES, computing)
    assert torch.equal(records, computing(IMAGES)) and computing.count == 10
    assert len(caplog.messages) == 1
    assert "No space left on device; features are computed and not kept" in caplog.messages[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # not even a part


def test_the_oldest_entries_make_room(filled: tuple[Path, torch.Tensor]) -> None:
    directory, _ = filled
    size = entries(directory)[0].stat().st_size
    opened(directory, largest_bytes=3 * size).records(IMAGES + 1, Computing())
    assert len(entries(directory)) == 3
    computing = Computing()
    opened(directory, largest_bytes=3 * size).records(IMAGES[2:] + 1, computing)
    assert computing.count == 0  # the last three are there


def test_a_party_seals_with_its_private_key_and_a_simulation_with_one_that_stays(tmp_path: Path) -> None:
    names = ["hospital-0", "hospital-1"]
    make_local_identities(names, {name: tmp_path / name for name in names})

    def cache_of(name: str, directory: Path) -> FeatureCache:
        site = {"identity": str(tmp_path / name), "feature_cache": str(directory)}
        found = open_feature_cache(configured().with_values(site=site), name)
        assert found is not None
        return found

    assert open_feature_cache(configured(), "hospital-0") is None
    counts = []
    for name in ("hospital-0", "hospital-0", "hospital-1"):
        computing = Computing()
        of_features(cache_of(name, tmp_path / "cache")).records(IMAGES, computing)
        counts.append(computing.count)
    assert counts == [5, 0, 5]

    simulated, counts = tmp_path / "simulated", []
    for name in names:  # identities of two runs
        make_simulation_key(simulated)
        computing = Computing()
        of_features(cache_of(name, simulated)).records(IMAGES, computing)
        counts.append(computing.count)
    assert counts == [5, 0]
    assert (simulated / KEY_FILE).stat().st_mode & 0o777 == 0o600
    (simulated / KEY_FILE).write_bytes(b"short")
    with pytest.raises(DataError, match="is no key"):
        cache_of("hospital-0", simulated)
    (simulated / KEY_FILE).chmod(0o644)
    with pytest.raises(IdentityError, match="can be read by other users"):
        cache_of("hospital-0", simulated)


def test_records_of_a_hospital_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured()
    images = load_hospital(config, 0, "test")
    plain = as_records(images, config)
    computed, features = [], feature_extractor.FeatureExtractor._features

    def counted(extractor: Any, image: torch.Tensor) -> torch.Tensor:
        computed.append(image)
        return features(extractor, image)

    monkeypatch.setattr(feature_extractor.FeatureExtractor, "_features", counted)
    for expected in (len(images), 0):
        computed.clear()
        kept = as_records(images, config, cache=FeatureCache(tmp_path, Seed(KEY)))
        assert torch.equal(kept.inputs, plain.inputs) and kept.names == images.names
        assert len(computed) == expected


def test_what_will_be_is_said(tmp_path: Path) -> None:
    assert about_features(Config()) is None
    assert about_features(configured()) == "Features are computed anew in this run (site.feature_cache: memory)."
    config = configured(tmp_path)
    assert "which has 0 records" in str(about_features(config))
    opened(tmp_path / "hospital-0").records(IMAGES, Computing())
    assert "which has 5 records" in str(about_features(config))
    opened(tmp_path).records(IMAGES[:2], Computing())
    assert "which has 7 records" in str(about_features(config))
    assert "which has 0 records" in str(about_features(configured(tmp_path, mirror=False)))


def test_what_the_trained_layers_read_is_said_too(tmp_path: Path) -> None:
    def about(cache: Path | str, **training: Any) -> str | None:
        return about_features(parse_config({"site": {"feature_cache": str(cache)}, "training": training}, "test"))

    assert about("memory", trainable="all") is None and about("memory", trainable="bias") is None
    assert "kept in memory for the run" in str(about("memory", trainable="head"))
    assert f"computed once, and kept in {tmp_path}, sealed." in str(about(tmp_path, trainable="last:2"))


@pytest.mark.parametrize(
    "training",
    [{}, {"trainable": "bias"}, {"trainable": "head", "augmentation": {"flip": True}}],
    ids=["all", "bias", "copies drawn anew"],
)
def test_a_cache_with_nothing_to_keep_is_refused(tmp_path: Path, training: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="keeps data.features, or what head or last:N reads; leave it at memory"):
        parse_config({"site": {"feature_cache": str(tmp_path)}, "training": training}, "test")
