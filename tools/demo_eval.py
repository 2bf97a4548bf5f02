"""Measure a saved demo checkpoint: held-out perplexity, expert usage, samples, loss plot.

What: `python tools/demo_eval.py corpus moeflow/demo --plot docs/images/demo-loss.png` reads the checkpoint
as any user would (transformers, bfloat16 weights) and adds "heldout", "expert_usage" and "samples" to its
training.json. train_demo.py calls `report` at its end.
Why so: figures come from the files that ship, not from the trainer's float32 state. Each held-out token is
scored once with 512 to 1,023 tokens before it (fewer only at the stream's start), so window edges cost
nothing, as with the n-gram baselines.
What it does not do: compare against other models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CONTEXT, STRIDE, BATCH = 1024, 512, 16
PROMPTS = [("In the beginning", 1), ("The king said", 2), ("It was a fine morning, and Elizabeth", 3)]


def heldout_windows(tokens: Tensor) -> list[tuple[Tensor, int]]:
    """Overlapping windows with the position from which each one's targets are new."""
    windows = []
    for start in range(0, len(tokens) - 1, STRIDE):
        new = 0 if start == 0 else CONTEXT - STRIDE
        window = tokens[start : start + CONTEXT + 1]
        if len(window) - 1 > new:
            windows.append((window, new))
    return windows


@torch.no_grad()
def measure(model: PreTrainedModel, tokens: Tensor) -> tuple[float, int, list[list[int]]]:
    """Summed nats, number of scored tokens, and how often each layer's router chose each expert."""
    total, scored = 0.0, 0
    usage = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts, dtype=torch.long)
    windows = heldout_windows(tokens)
    full = [w for w in windows if len(w[0]) == CONTEXT + 1 and w[1]]
    batches = [full[i : i + BATCH] for i in range(0, len(full), BATCH)]
    batches += [[w] for w in windows if len(w[0]) != CONTEXT + 1 or not w[1]]
    for batch in batches:
        stack, new = torch.stack([window for window, _ in batch]).to(model.device), batch[0][1]
        output = model(stack[:, :-1], output_router_logits=True, use_cache=False)
        logits, targets = output.logits[:, new:].float(), stack[:, 1 + new :]
        total += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        scored += targets.numel()
        for layer, router in enumerate(output.router_logits):
            chosen = router.float().view(len(batch), -1, usage.shape[1])[:, new:].topk(2, dim=-1).indices
            usage[layer] += torch.bincount(chosen.flatten(), minlength=usage.shape[1]).cpu()
    return total, scored, usage.tolist()


def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, seed: int, length: int = 100) -> str:
    """A sample with the checkpoint's own sampling settings."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=length)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def plot(record: dict[str, Any], path: Path) -> None:
    """Loss against step with the n-gram baselines as horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve, baselines = record["curve"], record["corpus"]["baselines"]
    steps = [point["step"] for point in curve]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    axes.plot(steps, [p["train_loss"] for p in curve], label="training (with dropout)", color="tab:blue")
    axes.plot(steps, [p["heldout_loss"] for p in curve], label="held-out", color="tab:orange")
    for name, label, style in (("unigram", "unigram", ":"), ("kneser_ney_5gram", "Kneser-Ney 5-gram", "--")):
        loss = baselines[name]["nats_per_token"]
        axes.axhline(loss, color="grey", linestyle=style, label=f"{label}, held-out ({loss:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title="Demo model: loss while training")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def report(corpus: Path, checkpoint: Path, picture: Path | None = None) -> None:
    """Evaluate the checkpoint, print the table and complete its training.json."""
    record: dict[str, Any] = json.loads((checkpoint / "training.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The weights' values are bfloat16 as shipped; float32 arithmetic makes the figures machine-independent.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = torch.from_numpy(np.load(corpus / "tokens.npz")["heldout"].astype(np.int64))
    total, scored, usage = measure(model, tokens)
    shares = (np.array(usage) / (2 * scored)).round(4)
    record["heldout"] = {
        "tokens_scored": scored,
        "nats_per_token": total / scored,
        "perplexity": float(np.exp(total / scored)),
        "bits_per_byte": total / np.log(2) / record["corpus"]["heldout"]["text_bytes"],
    }
    record["expert_usage"] = {
        "what": "share of held-out token assignments (two a token) per layer and expert; even would be 0.125",
        "least": shares.min(),
        "most": shares.max(),
        "layers": shares.tolist(),
    }
    # Sampling draws differ between devices: samples come from the CPU, where anyone can repeat them.
    model = model.to("cpu")
    samples = record["samples"] = []
    for prompt, seed in PROMPTS:
        samples.append({"prompt": prompt, "seed": seed, "text": generate(model, tokenizer, prompt, seed)})
    (checkpoint / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("heldout", "expert_usage", "samples")}, indent=1))
    if picture is not None:
        plot(record, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--plot", type=Path, help="write the loss curve to this PNG file")
    options = parser.parse_args()
    report(options.corpus, options.checkpoint, options.plot)


if __name__ == "__main__":
    main()
