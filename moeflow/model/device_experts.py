"""The experts of a decoding step without the host: lookup, copies, products and sum, all decided on the device.

Nothing here reads a value back, so that a whole step can be captured in one CUDA graph. What it computes is what
`model.experts` computes, from the packed weights directly: products in 16-bit fixed point with exact sums instead of
weights rounded to the model's dtype. Passes of more tokens than the cache has landing buffers for go to the runner that
streams layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeflow.kernels.gemv import DTYPES, MOST_TOKENS, Gate, Gemv, Jobs, Prepared, unsupported
from moeflow.kernels.junction import ExpertSum
from moeflow.kernels.launcher import Launcher
from moeflow.model.deferred import Deferred
from moeflow.model.experts import ExpertRunner
from moeflow.model.inputs import Inputs
from moeflow.model.recorder import Recorder
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.device import DeviceCache, Found
from moeflow.offload.lanes import Lanes, Mark
from moeflow.offload.predictor import Guesser, Keeper
from moeflow.offload.sharing import Sharing
from moeflow.schema import Manifest

__all__ = ["DeviceRunner", "gate_of", "unsupported_layout"]

THREADS = 256
GATES = {"SiLU": "SILU", "SiLUActivation": "SILU", "GELUActivation": "GELU", "GELU": "GELU", "GELUTanh": "GELU_TANH",
         "NewGELUActivation": "GELU_TANH", "ReLU": "RELU"}  # fmt: skip


def unsupported_layout(manifest: Manifest) -> str | None:
    """Why the kernels cannot multiply this model's experts, or None.

    A launch takes one layout for all experts of a layer; the host-driven way takes each expert's own.
    """
    if mixed := next((entry for entry in manifest.layers if entry.expert_layouts), None):
        return f"experts of {mixed.module} have different layouts, which the kernels cannot multiply yet"
    matrices = (matrix for layout in manifest.layouts for matrix in layout.matrices)
    return next((reason for matrix in matrices if (reason := unsupported(matrix))), None)


def gate_of(experts: Any) -> Gate | None:
    """The activation of an experts module as the kernels know it; None where only the module itself can compute it."""
    own = type(experts).__dict__.get("_apply_gate")
    if own is not None and own.__module__ != "transformers.integrations.moe":
        if not experts.is_concatenated and hasattr(experts, "limit") and hasattr(experts, "alpha"):
            return Gate("CLAMPED", float(experts.limit), float(experts.alpha))
        return None
    name = GATES.get(type(getattr(experts, "act_fn", None)).__name__)
    return Gate(name) if name and experts.is_concatenated else None


class DeviceRunner:
    """Runs the experts of all layers; one per engine."""

    def __init__(self, manifest: Manifest, cache: DeviceCache, launcher: Launcher, many: ExpertRunner):
        self.cache = cache
        self._many = many
        self._manifest = manifest
        self.launcher = launcher
        self._device = cache.device
        self.lanes = Lanes(cache.device)
        self._gemvs = [tuple(Gemv(launcher, m, cache.device) for m in y.matrices) for y in manifest.layouts]
        self._guess: Mark | None = None
        self._shown: Tensor | None = None  # what the side stream reads: its memory may not be given away before
        self.predictor: Guesser | ForcedRoutes | None = None
        self.routes: ForcedRoutes | None = None
        self.recorder: Recorder | None = None
        self.keeper: Keeper | None = None
        """Of the policy `learned`."""
        self.sharing = cache.splits if isinstance(cache.splits, Sharing) else None
        """Who computes what is left to the CPU."""
        self.inputs = Inputs()
        """What packed products share; the model's."""
        self.deferring: Callable[[], bool] = bool
        """Whether somebody may take over the experts' sum."""

    def expect(self, tokens: int) -> None:
        """A pass of so many tokens begins; before the model, so that the copies for a long one start first."""
        choices = tokens * self._manifest.model.top_k
        if self._streams(tokens, choices):
            self._many.expect(choices)

    def _streams(self, tokens: int, choices: int) -> bool:
        return tokens > MOST_TOKENS or choices > self.cache.most_choices

    def run(self, layer: int, module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        """As `ExpertRunner.run`."""
        tokens = hidden_states.shape[0]
        if self.routes is not None:
            top_k_index = self.routes.chosen(layer, top_k_index)
        if self.recorder is not None:
            self.recorder.note(layer, hidden_states, top_k_index, weights)
        if self.keeper is not None:
            self.cache.judge(layer, self.keeper(layer, hidden_states))
        if self._streams(tokens, top_k_index.numel()):
            return self._many.run(layer, module, hidden_states, top_k_index, weights)
        cache, lanes = self.cache, self.lanes
        if self._guess is not None:
            self._guess.wait()
            self._guess = self._shown = None
        found = cache.find(layer, top_k_index.to(torch.int64).contiguous(), tokens)
        shared = found.split is not None
        with lanes.copies():
            cache.copy(layer, 0, shared)
            gate_up_here = lanes.mark()
            cache.copy(layer, 1, shared)
            down_here = lanes.mark()
        self._guess_next(layer, hidden_states)
        gate_up, down = self._gemvs[self._manifest.layers[layer].layout]
        buffers = found.places if tokens == 1 else found.buffers
        choices = top_k_index.numel()
        jobs = Jobs(found.pool, buffers, choices, choices // tokens, found.starts, found.lists)
        x = self.inputs.prepare(gate_up, hidden_states)
        product = self._product(layer, 0, gate_up, x, jobs, tokens, found, gate_up_here)  # [T * K, 2I]
        gated = self._gated(module, down, product, hidden_states.dtype)
        jobs = Jobs(found.pool, buffers, choices, 1, found.starts, found.lists)
        results = self._product(layer, 1, down, gated, jobs, tokens, found, down_here)  # [T * K, H]
        return self._sum(results, weights, hidden_states)

    def _product(
        self, layer: int, half: int, gemv: Gemv, x: Prepared, jobs: Jobs, tokens: int, found: Found, here: Mark
    ) -> Tensor:
        """One half of all chosen experts, once what the link brings is `here`.

        Where the CPU has a share: cached experts meanwhile, then the rows that were brought, and the CPU's own; rows
        that it owes are computed from host memory. A launch that has nothing to compute ends at once.
        """
        split, sharing = found.split, self.sharing
        if split is None or sharing is None:
            here.wait()
            return gemv.multiply(x, jobs, tokens)
        sharing.post(layer, half, split, x)
        out = gemv.multiply(x, jobs, which=split.early(half))
        here.wait()
        gemv.multiply(x, jobs, which=split.brought(half), out=out)
        sharing.collect(layer, half, split, out)
        gemv.multiply(x, sharing.overdue(layer, jobs, split), which=sharing.taken(half, split), out=out)
        return out

    def _gated(self, module: Any, down: Gemv, product: Tensor, dtype: torch.dtype) -> Any:
        gate = gate_of(module)
        if gate is not None:
            return down.prepare(product, gate)
        return down.prepare(module._apply_gate(product.to(dtype)).contiguous())

    def _guess_next(self, layer: int, hidden_states: Tensor) -> None:
        """Let the next layer's probable experts follow this layer's needs over the link."""
        if self.predictor is None or layer + 1 == len(self._manifest.layers) or not self.cache.guesses:
            return
        if isinstance(self.predictor, ForcedRoutes) and hidden_states.shape[0] > 1:
            return  # no routes are forced upon several tokens
        self._shown = hidden_states
        with self.lanes.side():
            ids = self.predictor.guess(layer, hidden_states)
            self.cache.guess(layer + 1, ids[0].T.reshape(-1).contiguous())  # first choices first
            self._guess = self.lanes.mark()
        with self.lanes.copies(after=self._guess):
            self.cache.copy_guesses(layer + 1)

    def _sum(self, results: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """The router's weighted sum [T, H] of results [T * K, H]; left to the next norm where that can take it over."""
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        compute = partial(self._combine, results, weights.contiguous(), out)
        if self.deferring():
            return Deferred.of(out, ExpertSum(results, weights.contiguous()), compute)
        compute()
        return out

    def _combine(self, results: Tensor, weights: Tensor, out: Tensor) -> None:
        tokens, columns = out.shape
        defines: dict[str, int | str] = {
            "KIND": "DENSE",
            "BITS": 32,
            "OUTPUT": DTYPES[out.dtype],
            "WEIGHT": DTYPES[weights.dtype],
        }
        kernel = self.launcher.kernel("activation.cu", "combine", defines)
        grid = (-(-columns // THREADS), tokens, 1)
        kernel(grid, THREADS, results, weights, out, results.shape[0] // tokens, columns)

    def reset(self) -> None:
        """Start with a cold cache, after a pass that was abandoned midway."""
        self.lanes.synchronize()
        self._guess = self._shown = None
        self.cache.reset()
        self._many.reset()
