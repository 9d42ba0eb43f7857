"""How a tensor lies in memory: for whoever sends its bytes, hashes them, masks them in place or hands out a tensor.

A tensor may be a view: transposed, a part of another one, repeated without a copy (`expand`), or of sizes of one, whose
strides can be any number. What it means is its elements in row order. The two ends of a mask see only that order, so
nothing may depend on where elements lie.
"""

from __future__ import annotations

import torch


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in memory of their own, in row order and outside of autograd: any dtype and shape."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements in row order, uint8 of shape (bytes,); of a contiguous tensor without a copy."""
    rows = tensor.detach().resolve_neg().contiguous()
    if not rows.numel():
        return torch.empty(0, dtype=torch.uint8)
    # A size of one may have any stride, which `reshape` keeps and a view as bytes refuses.
    return rows.as_strided((rows.numel(),), (1,)).view(torch.uint8)


def elements_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in one place, so that writing to one would change the other.

    True for `expand` and for windows that overlap (`unfold`). Some interleaved views made by `as_strided` overlap nowhere
    and count as overlapping; no cutting, stepping or transposing of a tensor gives one.
    """
    span = 1  # places that the dimensions so far reach over
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride
    return False
