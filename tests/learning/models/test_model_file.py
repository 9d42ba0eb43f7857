"""Model files: what was saved comes back exactly, and nothing else is accepted, whatever is in the file."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import describe, load_model, save_model
from mpc_fl.learning.models.parameters import flatten_buffers, load_flat_buffers

CONFIG = parse_config({"data": {"image_size": 8}}, "test")


def network(config: Config = CONFIG, seed: int = 5) -> nn.Module:
    model = build_model(config, seed=seed)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return model


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    return {**state, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


def described(**changes: Any) -> dict[str, str]:
    return {"mpc-fl": json.dumps({**describe(CONFIG), **changes})}


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"image_size": 8}},
        {"data": {"image_size": 8}, "model": {"normalisation": "group"}},
        {"data": {"source": "breast_cancer", "classes": ["malignant", "benign"]}, "model": {"architecture": "mlp"}},
    ],
)
def test_what_was_saved_comes_back_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(values, "test")
    model = network(config)
    save_model(tmp_path / "model", model, config)
    loaded = load_model(tmp_path / "model", config)
    assert not loaded.training
    for (name, saved), (_, read) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert saved.dtype == read.dtype and torch.equal(saved, read), name


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """Parties compare the final model by its file."""
    for name in ("one", "other"):
        save_model(tmp_path / name, network(), CONFIG)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_nothing_half_written_when_saving_fails(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()  # in the way
    with pytest.raises(Exception, match="cannot write"):
        save_model(tmp_path / "model", network(), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def refusal(path: Path, config: Config = CONFIG) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path, config)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and str(path) in message
    return message


def whole(path: Path) -> bytes:
    save_model(path, network(), CONFIG)
    return path.read_bytes()


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    content = whole(path)
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :]


DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "shorter than a header": lambda path: whole(path)[:5],
    "cut in half": lambda path: whole(path)[: len(whole(path)) // 2],
    "last byte missing": lambda path: whole(path)[:-1],
    "one byte more": lambda path: whole(path) + b"x",
    "garbage": lambda path: bytes(range(256)) * 20,
    "enormous header": lambda path: struct.pack("<Q", 2**62) + whole(path)[8:],
    "unknown type": lambda path: with_header(path, lambda header: header["0.weight"].update(dtype="ZZ")),
    "larger shape": lambda path: with_header(path, lambda header: header["0.weight"].update(shape=[32, 1, 5, 6])),
    "overlapping": lambda path: with_header(path, lambda header: header["0.weight"].update(data_offsets=[0, 8])),
    "metadata of another form": lambda path: with_header(
        path, lambda header: header.update(__metadata__={"mpc-fl": 1})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGE[damage](path))
    assert "is corrupt or no safetensors file: give a model.safetensors written by mpc-fl train" in refusal(path)


def test_files_that_could_run_code_are_not_read_as_such(tmp_path: Path) -> None:
    """A pickle and a torch file (a zip with a pickle) would run this; a plain zip is just another format."""
    victim, path = tmp_path / "victim", tmp_path / "model"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (victim,))

    path.write_bytes(pickle.dumps(Payload()))
    assert "corrupt or no safetensors" in refusal(path)
    torch.save({"0.weight": Payload()}, path)
    assert "corrupt or no safetensors" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.weight", "x")
    assert "corrupt or no safetensors" in refusal(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Payload()))  # noqa: S301 - the payload works
    assert victim.exists()


def test_missing_and_unopenable_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file" / "model")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"mpc-fl": "[1]"},
        {"mpc-fl": "null"},
        {"mpc-fl": "{}"},
        described(format="mpc-fl model 9"),
    ],
)
def test_files_of_other_programs(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model", metadata=metadata)
    assert "does not describe an mpc-fl model" in refusal(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_descriptions_that_are_no_json(text: str, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model", metadata={"mpc-fl": text})
    assert "corrupt" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["normal", "viral"]}, 'has 2 classes ["normal", "viral"], the configuration 3 classes ["normal",'),
        ({"classes": ["viral", "bacterial", "normal"]}, "has 3 classes"),
        ({"classes": 7}, "has classes 7, the configuration 3 classes"),
        ({"architecture": "resnet18"}, 'has architecture "resnet18", the configuration architecture "small_cnn"'),
        ({"normalisation": "group"}, 'has normalisation "group"'),
        ({"input_shape": [1, 32, 32]}, "has input shape [1, 32, 32], the configuration input shape [1, 8, 8]"),
        ({"architecture": "\x1b[2J" * 1000 + "\n"}, r'has architecture "\u001b[2J'),  # would clear the user's terminal
    ],
)
def test_models_of_another_configuration(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model", metadata=described(**change))
    message = refusal(tmp_path / "model")
    assert words in message and message.endswith("use the configuration the model was trained with")
    assert message.isprintable()


def test_hidden_layers_of_another_size(tmp_path: Path) -> None:
    """The description does not hold them; the shapes of the tensors do."""
    wide = parse_config({"data": {"image_size": 8}, "model": {"architecture": "mlp", "hidden": [16]}}, "test")
    narrow = wide.with_values(model={"architecture": "mlp", "hidden": [8]})
    save_model(tmp_path / "model", network(wide), wide)
    assert "do not fit the architecture" in refusal(tmp_path / "model", narrow)


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "int8", "uint32", "bool"],
)
def test_weights_of_another_type(dtype: str, tmp_path: Path) -> None:
    """torch would convert them in silence, and cannot tell NaN in some."""
    save_file(
        tensors(**{"0__weight": tensors()["0.weight"].to(getattr(torch, dtype))}), tmp_path / "model", described()
    )
    assert "do not fit the architecture" in refusal(tmp_path / "model")


def test_tensors_missing_surplus_or_of_another_shape(tmp_path: Path) -> None:
    fewer = {name: tensor for name, tensor in tensors().items() if name != "0.weight"}
    for changed in (fewer, tensors(extra=torch.zeros(1)), tensors(**{"0__weight": torch.zeros(32, 1, 5, 4)})):
        save_file(changed, tmp_path / "model", described())
        assert "do not fit the architecture" in refusal(tmp_path / "model")


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(name: str, value: float, tmp_path: Path) -> None:
    state = tensors()
    state[name].view(-1)[-1] = value
    save_file(state, tmp_path / "model", described())
    assert f"holds NaN or infinite weights in '{name}'" in refusal(tmp_path / "model")


@given(st.data())
def test_a_flipped_byte_is_refused_or_changes_numbers_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never an unforeseen error. (A changed number cannot be told from a trained one: files carry no signature.)"""
    path = tmp_path_factory.getbasetemp() / "flipped"
    content = bytearray(whole(path))
    position = data.draw(st.integers(0, min(len(content) - 1, 3000)))  # the header and the first tensors
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = load_model(path, CONFIG)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.state_dict().values())


def test_flat_buffers_round_trip() -> None:
    source, target = network(), network(seed=6)
    for buffer in target.buffers():
        buffer.zero_()
    load_flat_buffers(target, flatten_buffers(source))
    floats = [(a, b) for a, b in zip(source.buffers(), target.buffers(), strict=True) if a.is_floating_point()]
    assert len(floats) == 4 and all(torch.equal(a, b) for a, b in floats)
    assert flatten_buffers(source).shape == (2 * 32 + 2 * 64,)
    assert flatten_buffers(nn.Linear(2, 2)).shape == (0,)
