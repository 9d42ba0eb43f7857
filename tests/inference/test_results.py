"""What the hospital keeps of a diagnosis, and how it says that an image got no result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ProtocolError
from mpc_fl.inference.results import Diagnosis, require_no_doubt, write_results
from mpc_fl.learning.data.dataset import Dataset

RECORDS = Dataset(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.arange(3), ("a", "b", "c"))


def test_a_doubtful_result_is_not_written_and_is_named(tmp_path: Path) -> None:
    logits = torch.tensor([7.25, 1.0])
    results = [Diagnosis.of(logits, 0.1), Diagnosis.of(logits, 0.1, "why"), Diagnosis.of_label(3, 3, 0.1)]
    write_results(Config(), RECORDS, results, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["index"], line["name"]) for line in lines] == [(0, "a")]
    with pytest.raises(ProtocolError, match="^image 2 of 3 and 1 more got no result: why; by chance") as raised:
        require_no_doubt(results)
    assert "7.25" not in str(raised.value)
    with pytest.raises(ProtocolError, match="its label is none of the classes"):
        require_no_doubt(results[2:])
    require_no_doubt([results[0], Diagnosis.of_label(2, 3, 0.1)])


def test_no_result_at_all(tmp_path: Path) -> None:
    write_results(Config(), RECORDS, [Diagnosis.of(torch.zeros(2), 0.1, "why")] * 3, tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == ""
