"""Measure a saved checkpoint on held-out text: loss by source, expert usage, samples, loss plot.

What: `python tools/evaluate_model.py corpus moeflow/demo --samples --plot docs/images/demo-loss.png` reads the
checkpoint as any user would (transformers, bfloat16 weights) and adds "heldout", "expert_usage" and "samples" to
its training.json.
Why so: figures come from the saved files, not from the trainer's float32 state. Each held-out token is scored once
with half to all of the context before it (fewer only at the stream's start), so window edges cost nothing, as with the
n-gram baselines. Bits per byte of a source count its own bytes, and the end tokens of its documents.
What it does not do: compare against other models.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss_plot import plot
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BATCH = 16
PROMPTS = [("In the beginning", 1), ("The king said", 2), ("It was a fine morning, and Elizabeth", 3)]


@dataclass(frozen=True)
class Sources:
    """The held-out stream's sources: names, bytes of each, and each token's source as an index. # [T]"""

    names: list[str]
    text_bytes: list[int]
    of_token: Tensor

    @classmethod
    def read(cls, corpus: Path) -> Sources:
        documents = json.loads((corpus / "heldout.json").read_text())
        names = list(dict.fromkeys(document["source"] for document in documents))
        indices = torch.tensor([names.index(document["source"]) for document in documents])
        lengths = torch.tensor([document["tokens"] for document in documents])
        sizes = [sum(d["bytes"] for d in documents if d["source"] == name) for name in names]
        return cls(names, sizes, indices.repeat_interleave(lengths))


def heldout_windows(count: int, context: int) -> list[tuple[int, int, int]]:
    """Windows that overlap by half: start, length (targets included), the position from which targets are new."""
    windows, stride = [], context // 2
    for start in range(0, count - 1, stride):
        new = 0 if start == 0 else context - stride
        length = min(context + 1, count - start)
        if length - 1 > new:
            windows.append((start, length, new))
    return windows


@torch.no_grad()
def measure(model: PreTrainedModel, tokens: Tensor, sources: Sources) -> tuple[Tensor, Tensor]:
    """Nats of every token but the first [T - 1], and how often each expert was chosen by layer and source [L, S, E]."""
    config = model.config
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    nats = torch.zeros(len(tokens) - 1)
    usage = torch.zeros(config.num_hidden_layers, len(sources.names) * experts, dtype=torch.long, device=model.device)
    tokens, of_token = tokens.to(model.device), sources.of_token.to(model.device)
    context = config.max_position_embeddings
    windows = heldout_windows(len(tokens), context)
    full = [w for w in windows if w[1] == context + 1 and w[2]]
    batches = [full[i : i + BATCH] for i in range(0, len(full), BATCH)]
    batches += [[w] for w in windows if w[1] != context + 1 or not w[2]]
    for batch in batches:
        _, length, new = batch[0]
        starts = torch.tensor([start for start, _, _ in batch], device=model.device)
        positions = starts[:, None] + torch.arange(length, device=model.device)  # [N, W]
        output = model(tokens[positions[:, :-1]], output_router_logits=True, use_cache=False)
        logits, targets = output.logits[:, new:].float(), tokens[positions[:, 1 + new :]]
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nats[positions[:, new:-1].flatten().cpu()] = losses.cpu()
        origin = of_token[positions[:, new:-1]].unsqueeze(-1)  # [N, W, 1]
        for layer, router in enumerate(output.router_logits):
            chosen = router.view(len(batch), -1, experts)[:, new:].topk(top_k, dim=-1).indices
            usage[layer] += torch.bincount((origin * experts + chosen).flatten(), minlength=usage.shape[1])
    return nats, usage.view(len(usage), -1, experts).cpu()


def losses(nats: Tensor, text_bytes: int) -> dict[str, float]:
    mean = nats.double().mean().item()
    return {
        "tokens_scored": len(nats),
        "nats_per_token": mean,
        "perplexity": float(np.exp(mean)),
        "bits_per_byte": mean * len(nats) / np.log(2) / text_bytes,
    }


def by_source(nats: Tensor, sources: Sources) -> dict[str, dict[str, float]]:
    target = sources.of_token[1:]
    return {name: losses(nats[target == index], sources.text_bytes[index]) for index, name in enumerate(sources.names)}


def expert_usage(counts: Tensor, top_k: int, sources: Sources) -> dict[str, Any]:
    """Shares of the choices by layer and expert, of all text and of each source."""
    overall = counts.sum(1).double()
    overall /= overall.sum(-1, keepdim=True)  # [L, E]
    own = counts.double() / counts.sum(-1, keepdim=True)  # [L, S, E]
    apart = (own - overall.unsqueeze(1)).abs().sum(-1).mean(0) / 2  # [S]
    return {
        "what": f"share of held-out token assignments ({top_k} a token) per layer and expert; "
        f"even would be {1 / counts.shape[-1]}",
        "least": round(overall.min().item(), 4),
        "most": round(overall.max().item(), 4),
        "layers": overall.numpy().round(4).tolist(),
        "by_source": {name: own[:, index].numpy().round(4).tolist() for index, name in enumerate(sources.names)},
        "apart_what": "share of a source's assignments that would move if its experts were used as in all text",
        "apart": {name: round(apart[index].item(), 4) for index, name in enumerate(sources.names)},
    }


def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, seed: int, length: int = 100) -> str:
    """A sample with the checkpoint's own sampling settings."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=length)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def report(corpus: Path, checkpoint: Path, with_samples: bool, picture: Path | None = None) -> dict[str, Any]:
    """Evaluate the checkpoint, print the results and complete its training.json."""
    record: dict[str, Any] = json.loads((checkpoint / "training.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The weights' values are bfloat16 as saved; float32 arithmetic makes the figures machine-independent.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    with np.load(corpus / "tokens.npz") as file:
        tokens = torch.from_numpy(file["heldout"].astype(np.int64))
    sources = Sources.read(corpus)
    nats, usage = measure(model, tokens, sources)
    record["heldout"] = losses(nats, record["corpus"]["heldout"]["text_bytes"])
    record["heldout"]["by_source"] = by_source(nats, sources)
    record["expert_usage"] = expert_usage(usage, model.config.num_experts_per_tok, sources)
    if with_samples:
        # Sampling draws differ between devices: samples come from the CPU, where anyone can repeat them.
        model, tokenizer = model.to("cpu"), AutoTokenizer.from_pretrained(checkpoint)
        record["samples"] = [
            {"prompt": prompt, "seed": seed, "text": generate(model, tokenizer, prompt, seed)}
            for prompt, seed in PROMPTS
        ]
    (checkpoint / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    if picture is not None:
        plot({checkpoint.name: record}, picture)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, help="folder written by corpus.py")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", action="store_true", help="generate from three fixed prompts")
    parser.add_argument("--plot", type=Path, help="write the loss curve to this PNG file")
    options = parser.parse_args()
    record = report(options.corpus, options.checkpoint, options.samples, options.plot)
    usage = record["expert_usage"]
    for name, row in {"all": record["heldout"], **record["heldout"]["by_source"]}.items():
        apart = f"  {usage['apart'][name]:.1%} of choices apart" if name in usage["apart"] else ""
        print(f"{name:24}{row['tokens_scored']:>9,} tokens {row['bits_per_byte']:.3f} bits/byte{apart}")
    for layer, shares in enumerate(usage["layers"]):
        print(f"layer {layer:2}: least used expert {min(shares):.1%}, most used {max(shares):.1%}")
    for sample in record.get("samples", []):
        print(json.dumps(sample))


if __name__ == "__main__":
    main()
