"""Make today's torch, torchvision and crypten importable together. Nothing happens where nothing is needed.

1. crypten 0.4.1 imports `torch.onnx._internal.registration` and friends, which torch 2.13 keeps under
   `torch.onnx._internal.torchscript_exporter`. We alias the one module; CrypTen's ONNX path itself stays unused.
2. torchvision registers Python kernels for its compiled operators at import. With a CPU-only torch its compiled
   library does not load, so the operators `torchvision::nms` and `torchvision::qnms` have no schema and the import
   fails. Defining the schemas is enough: no model uses them.

Call `prepare()` before the first import of either package. Idempotent.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_DETECTION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# torch.library drops its definitions when the object is collected, so it lives as long as the process.
_library: torch.library.Library | None = None


def _alias_onnx_registration() -> None:
    old_name = "torch.onnx._internal.registration"
    new_name = "torch.onnx._internal.torchscript_exporter.registration"
    if old_name in sys.modules or importlib.util.find_spec(old_name) is not None:
        return
    module = importlib.import_module(new_name)
    sys.modules[old_name] = module
    parent = importlib.import_module("torch.onnx._internal")
    parent.registration = module  # type: ignore[attr-defined]


def _torchvision_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    from pathlib import Path

    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return True
        except OSError:
            return False
    return False


def _define_detection_schemas() -> None:
    global _library
    if _library is not None or "torchvision" in sys.modules or _torchvision_library_loads():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _DETECTION_SCHEMAS:
        _library.define(schema)


def prepare() -> None:
    """Define what the installed torch lacks. Safe to call from every module that imports torchvision or crypten."""
    _alias_onnx_registration()
    _define_detection_schemas()
