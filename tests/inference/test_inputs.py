"""What the hospital takes from the model owner about its inputs, and what it makes of its images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ProtocolError
from mpc_fl.inference.inputs import ModelInputs, as_the_model_takes_them
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import range_of_inputs
from mpc_fl.links.links import Links
from mpc_fl.roles import HOSPITAL, MODEL_OWNER
from tests.support.harness import run_parties_in_memory


def configuration(**data: Any) -> Config:
    return Config().with_values(task="infer", data={"source": "images", "image_size": 8, **data})


def taken(config: Config, inputs: torch.Tensor, constants: list[list[float]] | None = None) -> ModelInputs:
    def program(links: Links) -> ModelInputs | None:
        if links.name == MODEL_OWNER:
            if constants is not None:
                links.send_tensor(HOSPITAL, "normalisation", torch.tensor(constants, dtype=torch.float64))
            return None
        count = len(inputs)
        dataset = Dataset(inputs, torch.zeros(count, dtype=torch.int64), torch.arange(count), ("a",) * count)
        return as_the_model_takes_them(config, dataset, links)

    found: ModelInputs = run_parties_in_memory(program, [HOSPITAL, MODEL_OWNER])[HOSPITAL]
    return found


def test_the_range_of_inputs_is_public() -> None:
    table = {"source": "csv", "table": {"features": 2}}
    ranged = {"source": "csv", "table": {"features": 2, "reference_ranges": [[0, 1], [0, 9]]}}
    assert range_of_inputs(configuration()) == (0, 1)
    assert range_of_inputs(configuration(**ranged)) == (-2, 2)
    low, high = range_of_inputs(configuration(**table))
    assert -low == high >= float(torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64).log1p())


def test_images_are_normalised_and_cut_off_at_the_public_range() -> None:
    inputs = torch.tensor([0.0, 0.5, 1.0, 3e38, float("inf"), float("-inf"), float("nan"), -7.0]).reshape(1, 1, 1, 8)
    found = taken(configuration(), inputs)
    assert found.largest == 1 and found.records.inputs.flatten().tolist() == [0, 0.5, 1, 1, 1, 0, 0, 0]
    found = taken(configuration(normalise="secure"), inputs, [[0.25], [0.5]])
    assert found.largest == 1.5
    assert found.records.inputs.flatten().tolist() == [-0.5, 0.5, 1.5, 1.5, 1.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("mean", "deviation", "what"),
    [
        (0.0, 1e-9, "could exceed 1024"),
        (1e9, 1.0, "could exceed 1024"),
        (0.0, 0.0, "constants cannot be"),
        (float("nan"), 1.0, "constants cannot be"),
    ],
)
@pytest.mark.parametrize("grey", [0.0, 1.0])
def test_constants_that_no_data_have_are_refused_whatever_the_image(
    mean: float, deviation: float, what: str, grey: float
) -> None:
    with pytest.raises(AssertionError, match=f"ProtocolError: the model owner.*{what}") as raised:
        taken(configuration(normalise="secure"), torch.full((1, 1, 8, 8), grey), [[mean], [deviation]])
    assert isinstance(raised.value.__cause__, ProtocolError)
