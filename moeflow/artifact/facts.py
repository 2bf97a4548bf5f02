"""Numbers of a model's config that planning needs, whatever a family calls them; read without transformers.

What the cache of keys and values holds per token is transformers' business, and follows its caches: latent keys
and values of DeepSeek stay compressed, sliding windows are counted as if they never slid, and the states of fixed
size that Mamba and convolution layers keep are spread over tokens. So the count is exact or too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from moeflow.errors import CheckpointError

__all__ = ["EXPERTS", "ModelConfig"]

TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
STATE_TOKENS = 512
"""States of fixed size count as if so many tokens shared them: too much for longer contexts, which is safe."""


class ModelConfig:
    """A checkpoint's `config.json`."""

    def __init__(self, values: Mapping[str, Any], file: Path):
        self.values = values
        self.file = file

    @classmethod
    def of(cls, values: Mapping[str, Any], source: Path) -> Self:
        """Of a config that is at `source`: a file of JSON, or a directory that has one."""
        return cls(values, source if source.suffix == ".json" else source / "config.json")

    def number(self, key: str) -> int:
        """A whole number.

        Raises:
            CheckpointError: it is not there.
        """
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {key} is {value!r}, a whole number is needed")
        return value

    def positive(self, key: str) -> int:
        """A whole number above zero.

        Raises:
            CheckpointError: it is not there, or not above zero.
        """
        value = self.number(key)
        if value < 1:
            raise CheckpointError(f"{self.file}: {key} is {value}, a whole number above zero is needed")
        return value

    def listed(self, key: str) -> list[Any]:
        """A list; empty where it is null or not there.

        Raises:
            CheckpointError: it is something else.
        """
        values = self.values.get(key)
        if values is not None and not isinstance(values, list):
            raise CheckpointError(f"{self.file}: {key} is {values!r}, a list is needed")
        return values or []

    def of_layer(self, key: str, layer: int) -> Any:
        """What a list with an entry for every layer says of one.

        Raises:
            CheckpointError: it is not there, or shorter than the model.
        """
        values = self.listed(key)
        if len(values) < self.layers:
            raise CheckpointError(f"{self.file}: {key} has {len(values)} entries, one for each layer is needed")
        return values[layer]

    def _most(self, names: tuple[str, ...]) -> int | None:
        """The first of `names` that is there; the largest, where it lists one number per layer."""
        for name in names:
            value = self.values.get(name)
            numbers = value if isinstance(value, list) and value else [value]
            if all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
                return int(max(numbers))
        return None

    @property
    def top_k(self) -> int:
        """Experts that the router chooses per token, in the layer where it chooses most."""
        found = self._most(TOP_K)
        if found is None:
            raise CheckpointError(f"{self.file}: has no whole number of chosen experts under {', '.join(TOP_K)}")
        return found

    @property
    def experts(self) -> int:
        """Experts per layer; 0 if the config has none of the names that families use."""
        return self._most(EXPERTS) or 0

    @property
    def layers(self) -> int:
        """Decoder layers, dense ones included."""
        return self.number("num_hidden_layers")

    @property
    def max_context(self) -> int:
        """Positions that the model was made for."""
        return int(self.values.get("max_position_embeddings") or 1 << 20)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the cache, over all layers."""
        kinds = self._layer_kinds()
        attention = sum(kind == "attention" for kind in kinds) * self._attention_values()
        state = sum(self._state_values(kind) for kind in kinds if kind != "attention")
        return attention - (-state // STATE_TOKENS)

    def _attention_values(self) -> int:
        """Of one layer and token."""
        if self.values.get("kv_lora_rank"):
            sparse = int(self.values.get("index_head_dim") or 0)  # keys of DeepSeek-V3.2's indexer
            return self.number("kv_lora_rank") + self.number("qk_rope_head_dim") + sparse
        query_heads = self.number("num_attention_heads")
        heads = self.values.get("num_key_value_heads") or query_heads
        head_dim = self.values.get("head_dim") or self.number("hidden_size") // query_heads
        return int(2 * heads * head_dim)

    def _layer_kinds(self) -> list[str]:
        """Per layer: attention, conv or mamba; what is unknown counts as attention, which holds most."""
        period, offset = self.values.get("attn_layer_period"), self.values.get("attn_layer_offset")
        if isinstance(period, int) and isinstance(offset, int) and period > 0:  # Jamba
            return ["attention" if i % period == offset else "mamba" for i in range(self.layers)]
        listed = self.values.get("layer_types") or self.values.get("layers_block_type")
        kinds = listed if isinstance(listed, list) else ["attention"] * self.layers
        return [kind if self._is_state(kind) else "attention" for kind in kinds]

    def _is_state(self, kind: Any) -> bool:
        """Whether the sizes of such a layer's state are known."""
        needed = {"conv": "conv_L_cache", "mamba": "mamba_d_state"}.get(str(kind))
        return needed is not None and needed in self.values

    def _state_values(self, kind: str) -> int:
        """Of one layer, however many tokens there were."""
        hidden = self.number("hidden_size")
        if kind == "conv":
            return hidden * self.number("conv_L_cache")
        state, conv = self.number("mamba_d_state"), self.number("mamba_d_conv")
        groups = int(self.values.get("mamba_n_groups") or 0)  # of Mamba 2
        return hidden * self.number("mamba_expand") * (state + conv) + 2 * groups * state * conv
