"""Device memory that a pass takes beside weights, caches and buffers, from shapes alone.

A pass over PREFILL_CHUNK tokens takes most. Its terms, T tokens with K experts each, H wide, I inside an expert:

- matrices: device-driven, one unpacked matrix, the largest there is, in the plan's dtype (`kernels.unpack.Workspace`).
  Host-driven, what torch holds at once while it dequantizes the largest (`kernels.dequantize`): `sizes.scratch` bytes a
  number; the finished matrix finds room in what became free. Resident matrices larger than `layout.UNPACKED` come in
  blocks of rows. A model whose experts differ within a layer is counted as host-driven in any case: kernels refuse it.
- activations, the largest of three moments, beside the residual and its norm, each [T, H]:
  - attention: its inputs and outputs, keys and values of the whole context repeated for every head, the mask;
  - experts: their sorted inputs and results, [T * K, H] each; all tokens at one expert, [T, 2I] and two of [T, I];
  - their sum: results, weighted results (float32, as routers' weights are), rounded, and back in the choices' order.
- library: cuBLAS keeps a workspace for each stream that ever multiplied; device-driven the main one, the one that a
  step is tried on before capture, and the one of the capture.
- rounding: torch's allocator asks for 20 MiB at once, of which the last is never full.

What is not here: logits of one position, and routes: less than one megabyte.
"""

from __future__ import annotations

from moeflow.planning.sizes import ITEM_SIZE, ModelSizes
from moeflow.schema import HardwareProfile
from moeflow.schema.profile import Dtype, Execution

__all__ = ["PREFILL_CHUNK", "activations", "library", "matrices", "workspace"]

PREFILL_CHUNK = 512
"""Tokens that go through the model at once in prefill; bounds the workspace."""

FLOAT32 = 4
STREAMS: dict[Execution, int] = {"device": 3, "host": 1}  # that multiply
SEGMENT = 20 << 20


def workspace(sizes: ModelSizes, hardware: HardwareProfile, dtype: Dtype, context: int, execution: Execution) -> int:
    """All of it, in bytes."""
    rounding = SEGMENT if hardware.gpu is not None else 0
    parts = (matrices(sizes, dtype, execution), activations(sizes, dtype, context), library(hardware, execution))
    return sum(parts) + rounding


def matrices(sizes: ModelSizes, dtype: Dtype, execution: Execution) -> int:
    """Of weights on their way from packed to multiplied."""
    item = ITEM_SIZE[dtype]
    packed = sizes.scratch > 0 or sizes.dtype != dtype  # plain numbers of another dtype are converted
    experts = max(layer.largest_matrix for layer in sizes.layers) if packed else 0
    mixed = any(layer.blobs for layer in sizes.layers)
    if execution == "device" and not mixed:
        return item * max(experts, sizes.largest_resident)
    return max(experts * max(item, sizes.scratch), sizes.largest_resident * max(item, sizes.resident_scratch))


def activations(sizes: ModelSizes, dtype: Dtype, context: int) -> int:
    """Of a prefill chunk, at the moment that takes most."""
    item = ITEM_SIZE[dtype]
    hidden, inner = max(layer.hidden for layer in sizes.layers), max(layer.inner for layer in sizes.layers)
    heads = max(hidden, sizes.largest_attention // max(1, hidden))  # all queries side by side: the largest projection
    attention = PREFILL_CHUNK * (3 * heads + context) + 2 * context * heads
    experts = PREFILL_CHUNK * (2 * sizes.top_k * hidden + 4 * inner)
    summed = PREFILL_CHUNK * sizes.top_k * hidden * (3 + FLOAT32 // item)
    return item * (2 * PREFILL_CHUNK * hidden + max(attention, experts, summed))


def library(hardware: HardwareProfile, execution: Execution) -> int:
    """Of cuBLAS, as torch sets it up: 32 MiB a stream from Hopper on, 8 1/8 before."""
    if hardware.gpu is None:
        return 0
    each = 32 << 20 if float(hardware.gpu.compute_capability) >= 9 else (8 << 20) + (128 << 10)
    return STREAMS[execution] * each
