"""Linear layers that came in 16 bits, kept so where a CPU computes in 32: half the bytes of every token.

Only weights that 16 bits hold exactly: what is computed with is what transformers would compute with. The head is the
largest of them; torch multiplies its 32 bits by one token with one thread. What is left to torch: small layers, whose
product costs less than handing it over, and weights that an embedding shares, which it looks up in 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeflow.artifact.layout import packed_matrix
from moeflow.kernels.cpu import unsupported
from moeflow.model.linear import PackedLinear
from moeflow.schema import DenseScheme

__all__ = ["keep_sixteen_bits"]

LEAST = 1 << 19  # weights of a layer that is worth it: a token took torch 0.17 ms, and 0.09 here; of half as many 0.08
AT_ONCE = 1 << 22  # weights that are looked at together


def keep_sixteen_bits(model: nn.Module) -> None:
    """Put packed layers in place of the float32 ones of `model` whose weights 16 bits hold exactly."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module.weight.numel() < LEAST or id(module.weight) in shared:
            continue
        dtype = _narrow_dtype(module.weight)
        if dtype is None:
            continue
        rows, columns = module.weight.shape
        matrix = packed_matrix(f"{name}.weight", rows, columns, DenseScheme(), str(dtype).removeprefix("torch."))
        if unsupported(matrix) is None:
            blob = module.weight.detach().to(dtype).view(torch.uint8).flatten()
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, PackedLinear(matrix, blob, bias, torch.float32))


def _narrow_dtype(weight: Tensor) -> torch.dtype | None:
    """A 16-bit dtype that holds all of `weight`, if that is in 32 bits."""
    if weight.dtype != torch.float32:
        return None
    parts = weight.detach().split(max(1, AT_ONCE // weight.shape[1]))
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(dtype).float(), part) for part in parts):
            return dtype
    return None
