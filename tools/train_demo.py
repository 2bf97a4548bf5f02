"""Train the bundled demo model on a prepared corpus and save it as an ordinary Mixtral checkpoint.

What: `python tools/train_demo.py corpus --output moeflow/demo --budget-seconds 240` (see demo_corpus.py for
the corpus) measures a step, fits the schedule into the budget, trains, and writes config, bfloat16 weights,
tokenizer, training.json and, through demo_eval.py, held-out results, expert usage and samples.
Why so: the number of steps is set before the learning-rate schedule starts, so the run always ends with the
rate at zero, on any machine; it is capped in epochs because the corpus, not time, is the scarce thing.
What it does not do: resume, use several devices, or choose among checkpoints (the last one is saved, so the
held-out figures are not the pick of a series).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_eval
import numpy as np
import torch
import transformers
from demo_model import Block, block, build, language_loss
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, MixtralForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PROBE_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run besides the corpus and the machine's speed."""

    seed: int
    max_epochs: float
    budget_seconds: float
    windows_per_step: int
    context: int = 1024
    peak_rate: float = 3e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    dropout: float = 0.1
    gradient_clip: float = 1.0


class Windows:
    """Random windows of the training stream, drawn on the device from a fixed seed."""

    def __init__(self, tokens: np.ndarray, settings: Settings, device: torch.device) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.count = settings.windows_per_step
        self.span = torch.arange(settings.context + 1, device=device)

    def draw(self) -> Tensor:
        last = len(self.tokens) - len(self.span)
        starts = torch.randint(last, (self.count, 1), generator=self.generator, device=self.tokens.device)
        return self.tokens[starts + self.span]


class Trainer:
    """Model, optimizer and schedule of one run."""

    def __init__(self, settings: Settings, tokens: dict[str, np.ndarray], vocabulary: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = settings
        self.heldout = torch.from_numpy(tokens["heldout"].astype(np.int64))
        self.epoch_tokens = len(tokens["train"])
        self.windows = Windows(tokens["train"], settings, self.device)
        self.run_block: Block = block
        self.restart(vocabulary)

    def restart(self, vocabulary: int) -> None:
        """Fresh weights and optimizer from the seed (the probe's steps must not count)."""
        self.model = build(vocabulary, self.settings.seed).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.settings.weight_decay}, {"params": vectors}],
            lr=self.settings.peak_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )

    def step(self, rate: float) -> Tensor:
        """One optimizer step at a share `rate` of the peak rate; returns the loss on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.peak_rate * rate
        tokens, dropout = self.windows.draw(), self.settings.dropout
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, router = language_loss(self.model, tokens, dropout, self.run_block)
        (loss + router).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean held-out loss over separate windows: cheap and pessimistic, for the curve only."""
        size = self.settings.context + 1
        windows = self.heldout[: len(self.heldout) // size * size].view(-1, size)
        total = 0.0
        for part in windows.split(self.settings.windows_per_step):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, _ = language_loss(self.model, part.to(self.device), 0.0)
            total += loss.item() * len(part)
        return total / len(windows)

    def probe(self) -> float:
        """Seconds per step, with the compiled block if this machine can compile it."""
        if self.device.type == "cuda":
            try:
                self.run_block = torch.compile(block)
                self.step(0.0)
            except Exception as error:  # whatever the compiler met: run eagerly
                print(f"not compiled: {error!r}"[:300], flush=True)
                self.run_block = block
        for _ in range(3):
            self.step(0.0).item()
        started = time.perf_counter()
        for _ in range(PROBE_STEPS):
            last = self.step(0.0)
        last.item()
        return (time.perf_counter() - started) / PROBE_STEPS

    def run(self, steps: int) -> list[dict[str, float]]:
        """Train with warmup and a cosine to zero; returns the curve's points."""
        curve, losses = [], []
        warmup = min(self.settings.warmup_steps, max(steps // 10, 1))
        started = time.perf_counter()
        for number in range(1, steps + 1):
            progress = max(number - warmup, 0) / max(steps - warmup, 1)
            losses.append(self.step(min(number / warmup, 0.5 * (1 + math.cos(math.pi * progress)))))
            if number % max(steps // 40, 1) == 0 or number == steps:
                train = torch.stack(losses).mean().item()
                point = {"step": number, "train_loss": train, "heldout_loss": self.heldout_loss()}
                point["seconds"] = time.perf_counter() - started
                curve.append(point)
                losses = []
                print({name: round(value, 4) for name, value in point.items()}, flush=True)
        return curve


def save(model: MixtralForCausalLM, tokenizer_file: Path, output: Path) -> None:
    """Write bfloat16 weights under Mixtral's per-expert names, with sampling defaults that read well."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer_file)),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(output)


def train(settings: Settings, corpus: Path, output: Path) -> None:
    tokens = dict(np.load(corpus / "tokens.npz"))
    recipe: dict[str, Any] = json.loads((corpus / "recipe.json").read_text())
    trainer = Trainer(settings, tokens, recipe["vocabulary"])
    seconds = trainer.probe()
    trainer.restart(recipe["vocabulary"])
    trainer.windows = Windows(tokens["train"], settings, trainer.device)
    step_tokens = settings.windows_per_step * settings.context
    wanted = settings.max_epochs * trainer.epoch_tokens / step_tokens
    steps = int(min(wanted, settings.budget_seconds / seconds))
    print(f"{seconds * 1e3:.1f} ms a step, {step_tokens / seconds:,.0f} tokens/s: {steps} steps", flush=True)
    started = time.perf_counter()
    curve = trainer.run(steps)
    output.mkdir(parents=True, exist_ok=True)
    save(trainer.model.cpu(), corpus / "tokenizer.json", output)
    device = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU"
    record = {
        "settings": asdict(settings),
        "hardware": device,
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compiled": trainer.run_block is not block,
        "steps": steps,
        "tokens_seen": steps * step_tokens,
        "epochs": steps * step_tokens / trainer.epoch_tokens,
        "training_seconds": time.perf_counter() - started,
        "milliseconds_per_step": seconds * 1e3,
        "curve": curve,
        "corpus": recipe,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, help="folder written by demo_corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--budget-seconds", type=float, default=240.0, help="most time for training steps")
    parser.add_argument("--max-epochs", type=float, default=40.0)
    parser.add_argument("--windows-per-step", type=int, default=48)
    parser.add_argument("--dropout", type=float, default=Settings.dropout)
    parser.add_argument("--peak-rate", type=float, default=Settings.peak_rate)
    parser.add_argument("--weight-decay", type=float, default=Settings.weight_decay)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--no-report", action="store_true", help="leave out evaluation, plot and samples")
    options = parser.parse_args()
    settings = Settings(
        seed=options.seed,
        max_epochs=options.max_epochs,
        budget_seconds=options.budget_seconds,
        windows_per_step=options.windows_per_step,
        peak_rate=options.peak_rate,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
    )
    train(settings, options.corpus, options.output)
    if not options.no_report:
        demo_eval.report(options.corpus, options.output)


if __name__ == "__main__":
    main()
