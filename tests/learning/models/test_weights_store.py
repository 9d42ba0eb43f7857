"""Stored weights: equal content has an equal name everywhere, and nothing is read under a name that is not its digest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, MpcFlError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.weights_store import describe_file, directory, find, is_digest, load, store

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4), "c.running_mean": torch.zeros(4)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mpc-fl" / "weights"


def refusal(digest: str, place: Path | None = None) -> str:
    with pytest.raises(ModelError) as error:
        load(digest, place)
    with pytest.raises(ModelError):
        find(digest, place)
    assert str(error.value).isprintable()
    return str(error.value)


def test_what_was_stored_comes_back(cache: Path) -> None:
    digest = store(TENSORS, "resnet18", "somewhere", {"classes": 3})
    path = find(digest, None)
    assert path == cache / f"{digest}.safetensors" and hashlib.sha256(path.read_bytes()).hexdigest() == digest
    tensors, description = load(digest, None)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert (description["architecture"], description["origin"]) == ("resnet18", "somewhere")


def test_equal_content_has_an_equal_name_whatever_the_order_in_memory() -> None:
    digest = store(TENSORS, "resnet18", "somewhere")
    turned = {name: TENSORS[name].t().contiguous().t() if name == "b" else TENSORS[name] for name in reversed(TENSORS)}
    assert store(turned, "resnet18", "somewhere") == digest
    assert (
        digest == "d27a915c9373ca2ddc57283b2e8f84aafa00892e6831188cb1968447940176da"
    )  # at every site, in every version
    others = [
        store({**TENSORS, "a": torch.zeros(4)}, "resnet18", "somewhere"),
        store(TENSORS, "resnet34", "somewhere"),
        store(TENSORS, "resnet18", "elsewhere"),
    ]
    assert len({digest, *others}) == 4


def test_a_site_may_keep_them_elsewhere(tmp_path: Path, cache: Path) -> None:
    digest = store(TENSORS, "resnet18", "somewhere")
    elsewhere = tmp_path / "site"
    elsewhere.mkdir()
    os.rename(cache / f"{digest}.safetensors", elsewhere / f"{digest}.safetensors")
    assert find(digest, elsewhere) == find(digest, elsewhere / f"{digest}.safetensors")
    message = refusal(digest)
    assert f"the initial weights {digest} are not at {cache}" in message
    assert "run mpc-fl model import or mpc-fl model fetch here" in message
    assert "are not at" in refusal(digest, elsewhere / "file") and "are not at" in refusal(digest, tmp_path)


def test_damage_is_found_on_every_read_and_mended_by_storing_again(cache: Path) -> None:
    digest = store(TENSORS, "resnet18", "somewhere")
    path = cache / f"{digest}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged or holds other weights: its SHA-256 is" in refusal(digest)
    assert store(TENSORS, "resnet18", "somewhere") == digest
    load(digest, None)


@pytest.mark.parametrize("name", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 63 + "\n", "a" * 65])
def test_what_is_no_digest_is_no_path(name: str) -> None:
    assert not is_digest(name)
    assert "64 digits" in refusal(name)


def test_other_files_under_their_own_digest_are_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain")
    save_file(TENSORS, tmp_path / "odd", metadata={"mpc-fl": '{"format": "mpc-fl weights 1", "architecture": 3}'})
    (tmp_path / "text").write_text("text")
    for name in ("plain", "odd", "text"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert str(tmp_path / name) in refusal(digest, tmp_path / name)


def test_descriptions_of_both_kinds_of_files(tmp_path: Path) -> None:
    digest = store(TENSORS, "resnet18", "somewhere", {"classes": 3})
    found = describe_file(find(digest, None))
    assert (found["architecture"], found["classes"], found["parameters"], found["sha256"]) == (
        "resnet18",
        3,
        10,
        digest,
    )
    config = Config().with_values(data={"image_size": 8})
    save_model(tmp_path / "model", build_model(config), config)
    found = describe_file(tmp_path / "model")
    assert found["classes"] == ["normal", "bacterial", "viral"] and found["input_shape"] == [1, 8, 8]
    assert found["parameters"] == sum(parameter.numel() for parameter in build_model(config).parameters())


def test_descriptions_that_would_disturb_a_reader_are_shortened(tmp_path: Path) -> None:
    deep = "[" * 50 + "]" * 50
    text = f'{{"format": "mpc-fl model 1", "a": "\\u001b[2J{"x" * 9000}", "b": {deep}, "sha256": "mine"}}'
    save_file(TENSORS, tmp_path / "model", metadata={"mpc-fl": text})
    found = describe_file(tmp_path / "model")
    assert found["a"].isprintable() and len(json.dumps(found)) < 3000
    assert is_digest(found["sha256"])


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert directory() == tmp_path / ".cache" / "mpc-fl" / "weights"


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MpcFlError, match="cannot write"):
        store(TENSORS, "resnet18", "somewhere")
