"""Two training runs with a cache of features, in one process: the second computes none, each hospital has its own entries."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.tables import Split
from mpc_fl.learning.models import feature_extractor
from tests.support.training_in_memory import SETTINGS, Training

SPLITS: tuple[Split, ...] = ("train", "test")
DATA = {
    "image_size": 64,
    "phantoms": {"train_patients": 9, "test_patients": 9},
    "features": {"extractor": "scattering", "mirror": False},
}


def test_a_second_run_computes_no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, lock, computed = feature_extractor.FeatureExtractor._features, threading.Lock(), 0

    def counted(extractor: Any, image: Any) -> Any:
        nonlocal computed
        with lock:
            computed += 1
        return features(extractor, image)

    monkeypatch.setattr(feature_extractor.FeatureExtractor, "_features", counted)
    site, models = {"feature_cache": str(tmp_path / "cache")}, []
    for run in ("first", "second"):
        computed = 0
        with pytest.MonkeyPatch.context() as patch:
            training = Training(
                tmp_path / run,
                patch,
                data=DATA,
                model={"architecture": "linear"},
                training={**SETTINGS["training"], "rounds": 1, "batch_size": 3, "sampling_seed": 1},
                site=site,
            )
            training.run()
        assert set(training.said.values()) == {"finished"}, training.said
        expected = [sum(len(load_hospital(training.config, rank, split)) for split in SPLITS) for rank in range(3)]
        assert computed == (sum(expected) if run == "first" else 0)
        models.append((training.party("aggregator") / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    counts = [len(list((tmp_path / "cache" / f"hospital-{rank}").glob("*/*.sealed"))) for rank in range(3)]
    assert counts == expected
    assert training.placed["aggregator"].site.feature_cache == "memory"
