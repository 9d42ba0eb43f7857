"""Files of networks that load without this program: torch's own exported programs, and ONNX.

Neither holds code of this program or a pickle of it: a file is a graph of operations with their tensors. Where in a source a
line stands, which both would write down, is taken out: it says where this program is installed, and nothing to a reader.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.exhaustion import exhaustion

Format = Literal["torch", "onnx"]
SUFFIXES: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
OUTPUTS = ("logits", "probabilities")
_ONNX_PACKAGES = ("onnx", "onnxscript")
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


def require_format(form: Format) -> None:
    """Raise `ConfigError` with pip's command where the packages that write such files are not installed."""
    missing = [name for name in _ONNX_PACKAGES if form == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {missing[0]}, which is not installed", "pip install 'mpc-fl[export]'")


def exported(network: nn.Module, form: Format, example: torch.Tensor, free: dict[int, str]) -> bytes:
    """A network from one float32 tensor to `OUTPUTS`, as the content of a file.

    `example` is an input of at least two records. `free` names the axes that may have any other length than there, also 1.
    Raises `ModelError` for a network that such files cannot hold.
    """
    dynamic = {axis: Dim(name) for axis, name in free.items()}
    with _quiet(), _told(form), torch.no_grad():
        program = torch.export.export(network.eval(), (example,), dynamic_shapes=(dynamic,), strict=False)
        return _onnx(program, dynamic) if form == "onnx" else _torch(program)


def _torch(program: ExportedProgram) -> bytes:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for trace in _TRACES:
                    node.meta.pop(trace, None)
    program.example_inputs = None
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _onnx(program: ExportedProgram, dynamic: dict[int, Dim]) -> bytes:
    made = torch.onnx.export(
        program, input_names=["input"], output_names=list(OUTPUTS), dynamic_shapes=(dynamic,), verbose=False
    )
    assert made is not None  # so it is with `dynamo`
    model = made.model_proto
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]
    content: bytes = model.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own progress; what it cannot do is an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _told(form: Format) -> Iterator[None]:
    """What torch cannot export, in one line."""
    try:
        yield
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        NotImplementedError,
        AttributeError,
        LookupError,
    ) as error:
        if (exhausted := exhaustion(error)) is not None:
            raise exhausted from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__)[:200]
        other = "torch" if form == "onnx" else "onnx"
        raise ModelError(
            f"the network cannot be exported for {form}: {reason}", f"try --format {other}, or use the model in mpc-fl"
        ) from None
