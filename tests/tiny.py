"""Tiny random checkpoints of the families that moeflow knows, written by transformers as the hub's are.

A few hundred thousand parameters: they pack and run in well under a second, and go through the same code as
Mixtral. Sizes are multiples of 64, so that the default group size fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tiny_families import CONFIGS, GENERIC, HIDDEN

__all__ = [
    "FAMILIES",
    "tiny_mixtral",
    "tiny_olmoe",
    "tiny_qwen2_moe",
    "tiny_qwen3_moe",
    "tiny_checkpoint",
    "tiny_unlisted",
]

SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = 128  # the special tokens, one token per printable character, and some that are never used
TOP_K = 2
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and the random state as it was."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def _save(directory: Path, config: object, seed: int, dtype: torch.dtype, max_shard_size: str) -> Path:
    from transformers import AutoModelForCausalLM

    with _quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomize(model)
        model.to(dtype)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    _save_tokenizer(directory)
    (directory / "LICENSE").write_text("Do what you like.\n")
    return directory


def _randomize(model: torch.nn.Module) -> None:
    """Norms of ones, biases of zeros and the like would hide a tensor that is missing or misplaced."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all()):
                tensor += 0.2 * torch.randn_like(tensor)


def _save_tokenizer(directory: Path) -> None:
    """One token a character, so that every prompt has a known length and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[0]))
    tokenizer.decoder = decoders.Fuse()
    unknown, begin, end = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _common(layers: int, hidden: int, **more: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # the default 0.02 makes the logits of so small a model nearly equal
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **more,
    }


def tiny_mixtral(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 64,
    experts: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Path:
    """A random Mixtral in `directory`, which is returned; `max_shard_size` splits it over several files."""
    from transformers import MixtralConfig

    config = MixtralConfig(**_common(layers, hidden, intermediate_size=intermediate, num_local_experts=experts))
    return _save(directory, config, seed, dtype, max_shard_size)


def tiny_qwen3_moe(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 64,
    experts: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    dense_layers: tuple[int, ...] = (),
) -> Path:
    """A random Qwen3-MoE; the layers in `dense_layers` have an ordinary MLP instead of experts."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        **_common(
            layers,
            hidden,
            moe_intermediate_size=intermediate,
            intermediate_size=2 * intermediate,
            num_experts=experts,
            head_dim=hidden // 4,
            norm_topk_prob=True,
            mlp_only_layers=list(dense_layers),
        )
    )
    return _save(directory, config, seed, dtype, max_shard_size)


def tiny_olmoe(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 64,
    experts: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Path:
    """A random OLMoE."""
    from transformers import OlmoeConfig

    config = OlmoeConfig(**_common(layers, hidden, intermediate_size=intermediate, num_experts=experts))
    return _save(directory, config, seed, dtype, max_shard_size)


def tiny_qwen2_moe(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 64,
    experts: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Path:
    """A random Qwen2-MoE: beside the experts, each layer has a shared one that every token uses."""
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        **_common(
            layers,
            hidden,
            moe_intermediate_size=intermediate,
            shared_expert_intermediate_size=2 * intermediate,
            intermediate_size=2 * intermediate,
            num_experts=experts,
        )
    )
    return _save(directory, config, seed, dtype, max_shard_size)


def _tiny_family(name: str) -> Callable[..., Path]:
    def build(
        directory: Path,
        layers: int = 3,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        max_shard_size: str = "5GB",
        **changes: object,
    ) -> Path:
        import transformers

        kind, settings = CONFIGS[name]
        values = {**_common(layers, HIDDEN), **settings, **changes}
        for other in ("moe_k", "moe_topk"):  # the family's own name for the same number
            if other in settings:
                del values["num_experts_per_tok"]
        return _save(directory, getattr(transformers, kind)(**values), seed, dtype, max_shard_size)

    return build


def tiny_unlisted(directory: Path, name: str) -> Path:
    """A random model of a type in `UNLISTED`; raises ValueError where this transformers does not know it."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(name)
    values = {key: value for key, value in {**_common(3, HIDDEN), **GENERIC}.items() if hasattr(default, key)}
    if name == "granitemoehybrid":
        values["layer_types"] = ["mamba", "attention", "mamba"]
    if not hasattr(default, "kv_lora_rank"):
        values["num_key_value_heads"] = 2
    return _save(directory, AutoConfig.for_model(name, **values), 0, torch.bfloat16, "5GB")


FAMILIES = {
    **{name: _tiny_family(name) for name in CONFIGS},
    "mixtral": tiny_mixtral,
    "olmoe": tiny_olmoe,
    "qwen2_moe": tiny_qwen2_moe,
    "qwen3_moe": tiny_qwen3_moe,
}


def tiny_checkpoint(directory: Path, family: str = "mixtral", **settings: object) -> Path:
    """A tiny checkpoint of any family in `FAMILIES`."""
    return FAMILIES[family](directory, **settings)
