"""Whether an exported file gives the answers of the model: loaded by a fresh interpreter, asked about records made here.

The records are nobody's: phantoms, and rows within the public ranges of a table. What the model answers is computed by the readers
of `learning.data` and the parts of training and diagnosis, not by the network that was exported.
"""

from __future__ import annotations

import datetime
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpc_fl.apps.runs.export_formats import Format
from mpc_fl.config.columns import ColumnSection, iso_date
from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, printable
from mpc_fl.learning.data.image_files import ImageForm, made_square
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.data.table_columns import encode_rows
from mpc_fl.learning.data.table_files import TableFile
from mpc_fl.learning.data.tables import scale_features
from mpc_fl.learning.models.input_layers import cell_value

LARGEST_DIFFERENCE = 1e-3  # of a logit
_RECORDS = 4
_DEADLINE = 600  # seconds
_PLACES = (0.0, 0.25, 0.75, 1.25)  # of numbers within their range; the last is cut off
_DAYS_PER_YEAR = 365.25

# Reads shapes from its arguments and float32 from standard input; writes logits and probabilities of each, one after the other.
# No module of this program can be imported there.
_PROGRAM = """
import sys
sys.modules["mpc_fl"] = None
sys.path[:] = filter(None, sys.path)
import numpy
engine, path, *shapes = sys.argv[1:]
if engine == "torch":
    import torch
    network = torch.export.load(path).module()
    answers = lambda given: [answer.numpy() for answer in network(torch.from_numpy(given))]
elif engine == "onnxruntime":
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answers = lambda given: session.run(["logits", "probabilities"], {"input": given})
else:
    from onnx.reference import ReferenceEvaluator
    session = ReferenceEvaluator(path)
    answers = lambda given: session.run(["logits", "probabilities"], {"input": given})
values = numpy.frombuffer(sys.stdin.buffer.read(), numpy.float32)
for text in shapes:
    shape = [int(side) for side in text.split("x")]
    count = int(numpy.prod(shape))
    given, values = values[:count].reshape(shape).copy(), values[count:]
    for answer in answers(given):
        sys.stdout.buffer.write(numpy.ascontiguousarray(answer, numpy.float32).tobytes())
"""


@dataclass(frozen=True)
class Question:
    """Inputs of an exported network, float32 (N, ...), and the same as a reader of `learning.data` gives them."""

    inputs: torch.Tensor
    records: torch.Tensor


def questions(config: Config) -> list[Question]:
    """Records of nobody to ask a network of this configuration about. More than one form of input where it takes several."""
    if config.data.is_table:
        return [_rows(config)]
    phantoms = public_phantoms(_RECORDS, config)
    if config.data.wrong_size == "error":
        return [Question(phantoms, phantoms)]
    side, form = config.data.image_size, ImageForm.of(config.data)
    wide = torch.cat([phantoms, phantoms.flip(0)[..., : side // 2 + 1]], dim=-1)
    tall = torch.nn.functional.interpolate(phantoms, (2 * side + 3, side + 1), mode="bilinear").clamp(0, 1)
    return [
        Question(pictures, torch.stack([made_square(picture, form)[0] for picture in pictures]).clamp(0, 1))
        for pictures in (wide, tall)
    ]


def _rows(config: Config) -> Question:
    columns = config.data.table.columns
    if columns is None:
        low, high = np.array(config.data.table.reference_ranges or [(-3.0, 1000.0)]).T
        values = low + np.array(_PLACES)[:, None] * (high - low) + np.zeros(config.data.input_shape)
        rows = values.astype(np.float32)
        return Question(torch.from_numpy(rows), torch.from_numpy(scale_features(rows.astype(np.float64), config)))
    cells = [[_cell(column, place) for column in columns] for place in range(_RECORDS)]
    numbers = [
        [cell_value(column, cell) if cell else torch.nan for column, cell in zip(columns, row, strict=True)]
        for row in cells
    ]
    names = [column.name for column in columns]
    file = TableFile(Path("records"), names, [(line + 2, row) for line, row in enumerate(cells)], "utf-8", ",")
    features = encode_rows(file, columns, range(len(columns)), may_leave_out=False).features
    return Question(torch.tensor(numbers, dtype=torch.float32), torch.from_numpy(features.astype(np.float32)))


def _cell(column: ColumnSection, place: int) -> str:
    """A cell of a column as a file has it; of four one is missing, where there is a rule for that."""
    if place == 1 and column.missing in ("fill", "indicator"):
        return ""
    if column.kind == "category":
        return column.categories[place % len(column.categories)]
    if column.kind == "boolean":
        return ("true", "false")[place % 2]
    low, high = column.range or (-3.0, 5.0)
    value = low + _PLACES[place] * (high - low)
    if column.kind == "number":
        return repr(float(np.float32(value)))
    assert column.since is not None  # `ColumnSection` saw to it
    day = iso_date(column.since).toordinal() + round(value * _DAYS_PER_YEAR)
    return datetime.date.fromordinal(min(max(day, 1), datetime.date.max.toordinal())).isoformat()


def engine_of(form: Format) -> str:
    """What loads such a file here: torch, onnxruntime, or where that is not installed the slower reference of onnx."""
    if form == "torch":
        return "torch"
    return "onnxruntime" if importlib.util.find_spec("onnxruntime") is not None else "onnx.reference"


def answers_of_file(path: Path, engine: str, inputs: list[torch.Tensor], classes: int) -> list[torch.Tensor]:
    """Logits and probabilities, float32 (2, N, classes) for each of the inputs, by an interpreter that loads the file anew.

    Raises `ModelError` where it cannot be loaded or asked there.
    """
    shapes = ["x".join(map(str, given.shape)) for given in inputs]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, engine, str(path.absolute()), *shapes],
            input=b"".join(given.contiguous().numpy().tobytes() for given in inputs),
            capture_output=True, timeout=_DEADLINE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"the exported file gave no answer within {_DEADLINE} s", "use a faster machine") from None
    sizes = [2 * len(given) * classes for given in inputs]
    if done.returncode or len(done.stdout) != 4 * sum(sizes):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it gave other answers than logits"]
        raise ModelError(
            f"the exported file does not load by itself with {engine}: {printable(said[-1], 200)}",
            "choose another --format, and tell the authors of mpc-fl",
        )
    values = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).split(sizes)
    return [part.reshape(2, -1, classes) for part in values]


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of all logits and probabilities; infinite where one is no number."""
    difference = float((found - expected).abs().max())
    return difference if difference == difference else float("inf")
