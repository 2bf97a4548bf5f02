"""Norms, rotary positions and the growth of a static cache, one launch each: the small operations of a decoding step.

Raw tensors in and out, of the model's own dtype. Each rounds where transformers' modules round, so that `rotate` and
`append` give their bits; `norm` adds up in another order. What a kernel cannot take is named by its `..._refuses`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.kernels.gemv import DTYPES
from moeflow.kernels.launcher import Launcher

__all__ = ["aligned", "append", "append_refuses", "norm", "norm_refuses", "rotate", "rotate_refuses", "strided"]

NUMBERS = 8  # that a thread reads at once
MOST_THREADS = 1024
MOST_VECTORS = 4  # of a thread's registers: rows of up to 32,768 numbers
THREADS = 256


def norm_refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why `norm` cannot take these, or None."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"numbers are {x.dtype}, the weight is {weight.dtype}"
    columns = weight.numel()
    if x.shape[-1] != columns or columns % NUMBERS or columns > NUMBERS * MOST_THREADS * MOST_VECTORS:
        return f"rows of {x.shape[-1]} and a weight of {columns} numbers"
    return None if x.numel() and aligned(x, weight) else "not aligned to 16 bytes"


def norm(launcher: Launcher, x: Tensor, weight: Tensor, eps: float, late: bool = False) -> Tensor:
    """RMS norm of the rows of x [..., N].

    Args:
        launcher: runs the kernel.
        x: the rows.
        weight: [N], of the same dtype.
        eps: added to the mean of squares.
        late: whether the product with the weight is what is rounded, and not the normalized row as well.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = weight.numel()
    groups = columns // NUMBERS
    vectors = -(-groups // MOST_THREADS)
    defines = {"ELEMENT": DTYPES[x.dtype], "VECTORS": vectors, "LATE": int(late)}
    kernel = launcher.kernel("dense.cu", "rms_norm", defines)
    kernel(x.numel() // columns, _warps(-(-groups // vectors)), x, weight.contiguous(), out, columns, float(eps))
    return out


def rotate_refuses(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why `rotate` cannot take these, or None."""
    if q.dtype not in DTYPES or {k.dtype, cos.dtype, sin.dtype} != {q.dtype}:
        return f"query {q.dtype}, key {k.dtype}, table {cos.dtype}"
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or q.shape[0] != 1 or cos.shape != sin.shape:
        return f"query {tuple(q.shape)}, table {tuple(cos.shape)}"
    tokens, width = q.shape[2:]
    fits = k.shape[0] == 1 and k.shape[2:] == q.shape[2:] and cos.shape[:2] == (1, tokens) and width % 2 == 0
    if not fits or cos.shape[2] not in (width, width // 2) or q.stride(3) != 1 or k.stride(3) != 1:
        return f"query {tuple(q.shape)}, key {tuple(k.shape)}, table {tuple(cos.shape)}"
    return None


def rotate(launcher: Launcher, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin for q [1, Hq, T, D] and k [1, Hk, T, D].

    Args:
        launcher: runs the kernel.
        q: queries, by any strides.
        k: keys.
        cos: [1, T, D], or [1, T, D / 2] where both halves have the same.
        sin: of the same shape.
    """
    _, q_heads, tokens, width = q.shape
    k_heads = k.shape[1]
    q_out = torch.empty(1, tokens, q_heads, width, dtype=q.dtype, device=q.device)
    k_out = torch.empty(1, tokens, k_heads, width, dtype=k.dtype, device=k.device)
    kernel = launcher.kernel("dense.cu", "rotate", {"ELEMENT": DTYPES[q.dtype]})
    pairs = (q_heads + k_heads) * tokens * width // 2
    strides = (q.stride(1), q.stride(2), k.stride(1), k.stride(2))
    sizes = (q_heads, k_heads, tokens, width, cos.shape[2])
    kernel(
        -(-pairs // THREADS), THREADS, strided(q), strided(k), cos.contiguous(), sin.contiguous(), q_out, k_out,
        *sizes, *strides,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def append_refuses(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> str | None:
    """Why `append` cannot take these, or None."""
    if k.dtype not in DTYPES or {v.dtype, keys.dtype, values.dtype} != {k.dtype} or length.dtype != torch.int64:
        return f"keys {k.dtype} into {keys.dtype}"
    fits = k.shape[:3] == v.shape[:3] and k.shape[:2] == keys.shape[:2] == values.shape[:2] and k.shape[0] == 1
    if not fits or k.shape[3] != keys.shape[3] or v.shape[3] != values.shape[3]:
        return f"keys {tuple(k.shape)} into {tuple(keys.shape)}"
    if k.shape[3] % NUMBERS or v.shape[3] % NUMBERS or not (keys.is_contiguous() and values.is_contiguous()):
        return f"heads of {k.shape[3]} and {v.shape[3]} numbers"
    return None if length.device == keys.device and aligned(k, v, keys, values) else "not aligned to 16 bytes"


def append(launcher: Launcher, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """Write k, v [1, H, T, .] into keys, values [1, H, S, .] from position `length` on, and add T to `length`."""
    _, heads, tokens, k_width = k.shape
    v_width, capacity = v.shape[3], keys.shape[2]
    threads = _warps(heads * tokens * (k_width + v_width) // NUMBERS)
    kernel = launcher.kernel("dense.cu", "append", {"ELEMENT": DTYPES[k.dtype]})
    strides = (k.stride(1), k.stride(2), v.stride(1), v.stride(2))
    sizes = (heads, tokens, capacity, k_width, v_width)
    kernel(1, threads, strided(k), strided(v), keys, values, length, *sizes, *strides)


def _warps(threads: int) -> int:
    return min(MOST_THREADS, -(-threads // 32) * 32)


def strided(x: Tensor) -> Tensor | int:
    """What a kernel that is told the strides takes: the address, where a launcher would ask for contiguous memory."""
    return x if x.is_contiguous() else x.data_ptr()


def aligned(*tensors: Tensor) -> bool:
    """Whether every row of eight numbers lies at a multiple of 16 bytes."""
    unit = NUMBERS if tensors[0].element_size() == 2 else NUMBERS // 2
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride % unit == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
        for x in tensors
    )
