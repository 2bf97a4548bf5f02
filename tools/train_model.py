"""Train one of the project's models on a prepared corpus and save it as an ordinary Mixtral checkpoint.

What: `python tools/train_model.py corpus --shape mid-8x2 --output DIR --budget-seconds 200` (see corpus.py for the
corpus, trained_model.py for the shapes) measures a step, trains, and writes config, bfloat16 weights, tokenizer
and training.json; evaluate_model.py adds what the saved files are worth.
Why so: the budget counts reading, compiling and probing too, and the learning rate follows the share of it that is
spent, so the run ends on time and with the rate at zero on any machine. It is capped in epochs where the
corpus, not time, is the scarce thing; below the budget a run depends on its seed alone.
What it does not do: resume, use several devices, or choose among checkpoints (the last one is saved, so the
held-out figures are not the pick of a series).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from trained_model import SHAPES, Block, Shape, block, build, language_loss
from transformers import GenerationConfig, MixtralForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PROBE_STEPS, PROBE_SECONDS = 20, 5.0
CURVE_POINTS, CURVE_WINDOWS = 40, 128


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run besides the corpus and the machine's speed."""

    shape: str
    windows_per_step: int
    peak_rate: float
    dropout: float
    seed: int = 20
    max_epochs: float = 40.0
    budget_seconds: float = 240.0
    warmup_steps: int = 300
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    balance: float = 0.01


DEFAULTS = {
    "demo": Settings("demo", windows_per_step=48, peak_rate=3e-3, dropout=0.1),
    "mid-8x2": Settings("mid-8x2", windows_per_step=64, peak_rate=2e-3, dropout=0.05),
    "mid-32x4": Settings("mid-32x4", windows_per_step=64, peak_rate=2e-3, dropout=0.05),
}


class Windows:
    """Random windows of the training stream, drawn on the device from a fixed seed."""

    def __init__(self, tokens: Tensor, context: int, settings: Settings) -> None:
        self.tokens = tokens
        self.generator = torch.Generator(tokens.device).manual_seed(settings.seed)
        self.count = settings.windows_per_step
        self.span = torch.arange(context + 1, device=tokens.device)

    def draw(self) -> Tensor:
        last = len(self.tokens) - len(self.span)
        starts = torch.randint(last, (self.count, 1), generator=self.generator, device=self.tokens.device)
        return self.tokens[starts + self.span]


def spread_windows(tokens: Tensor, size: int, most: int) -> Tensor:
    """At most `most` separate windows [N, size], evenly spread over the stream."""
    windows = tokens[: len(tokens) // size * size].view(-1, size)
    chosen = torch.linspace(0, len(windows) - 1, min(most, len(windows))).long()
    return windows[chosen]


class Trainer:
    """Model, optimizer and schedule of one run."""

    def __init__(self, settings: Settings, shape: Shape, tokens: dict[str, np.ndarray], vocabulary: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings, self.shape, self.vocabulary = settings, shape, vocabulary
        heldout = torch.from_numpy(tokens["heldout"].astype(np.int64))
        self.heldout = spread_windows(heldout, shape.context + 1, CURVE_WINDOWS)
        self.train_tokens = torch.from_numpy(tokens["train"].astype(np.int64)).to(self.device)
        self.run_block: Block = block
        self.model = self.fresh_model().to(self.device)
        self.restart()

    def fresh_model(self) -> MixtralForCausalLM:
        return build(self.shape, self.vocabulary, self.settings.seed, self.settings.balance)

    def restart(self) -> None:
        """Weights, optimizer and windows as the seed gives them (the probe's steps must not count).

        The weights are set in place: to a compiled block, new parameters could be a reason to compile again.
        """
        self.model.load_state_dict(self.fresh_model().state_dict())
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.settings.weight_decay}, {"params": vectors}],
            lr=self.settings.peak_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.windows = Windows(self.train_tokens, self.shape.context, self.settings)

    def autocast(self) -> torch.autocast:
        """bfloat16 products on a GPU; CPUs without bfloat16 units would be slower by it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, rate: float) -> Tensor:
        """One optimizer step at a share `rate` of the peak rate; returns the loss on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.peak_rate * rate
        tokens, dropout = self.windows.draw(), self.settings.dropout
        with self.autocast():
            loss, router = language_loss(self.model, tokens, dropout, self.run_block)
        (loss + router).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss of some separate held-out windows: cheap and pessimistic, for the curve only."""
        total = 0.0
        for part in self.heldout.split(self.settings.windows_per_step):
            with self.autocast():
                loss, _ = language_loss(self.model, part.to(self.device), 0.0)
            total += loss.item() * len(part)
        return total / len(self.heldout)

    def compile(self) -> None:
        """Compile the block if this machine can."""
        if self.device.type != "cuda":
            return
        try:
            self.run_block = torch.compile(block)
            self.step(0.0).item()
        except Exception as error:  # whatever the compiler met: run eagerly
            print(f"not compiled: {error!r}"[:300], flush=True)
            self.run_block = block

    def probe(self) -> float:
        """Seconds per step."""
        self.step(0.0).item()
        started, steps = time.perf_counter(), 0
        while steps < PROBE_STEPS and time.perf_counter() - started < PROBE_SECONDS:
            self.step(0.0).item()
            steps += 1
        return (time.perf_counter() - started) / steps

    def run(self, most_steps: int, seconds: float, step_seconds: float, log: Path | None) -> list[dict[str, float]]:
        """Train with warmup and a cosine to zero until steps or seconds are spent; returns the curve's points."""
        curve, losses = [], []
        expected = max(min(most_steps, int(seconds / step_seconds)), 1)
        warmup = min(self.settings.warmup_steps, max(expected // 10, 1))
        started, number = time.perf_counter(), 0
        while number < most_steps:
            number += 1
            spent = max(number / most_steps, (time.perf_counter() - started) / seconds)
            falling = min(max(spent - warmup / expected, 0.0) / max(1 - warmup / expected, 1e-9), 1.0)
            losses.append(self.step(min(number / warmup, 0.5 * (1 + math.cos(math.pi * falling)))))
            if number % max(expected // CURVE_POINTS, 1) == 0 or spent >= 1:
                train = torch.stack(losses).mean().item()
                point = {"step": number, "train_loss": train, "heldout_loss": self.heldout_loss()}
                point["seconds"] = time.perf_counter() - started
                curve.append(point)
                losses = []
                print({name: round(value, 4) for name, value in point.items()}, flush=True)
                if log is not None:
                    with log.open("a") as file:
                        file.write(json.dumps(point) + "\n")
            if spent >= 1:
                break
        return curve


def save(model: MixtralForCausalLM, tokenizer_file: Path, output: Path, max_shard_size: str) -> None:
    """Write bfloat16 weights under Mixtral's per-expert names, with sampling defaults that read well."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size=max_shard_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer_file)),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(output)


def train(
    settings: Settings,
    shape: Shape,
    corpus: Path,
    output: Path,
    max_shard_size: str = "5GB",
    log: Path | None = None,
) -> dict[str, Any]:
    """One whole run; writes the checkpoint and training.json and returns the latter's content."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with np.load(corpus / "tokens.npz") as file:
        tokens = dict(file)
    recipe: dict[str, Any] = json.loads((corpus / "recipe.json").read_text())
    trainer = Trainer(settings, shape, tokens, recipe["vocabulary"])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    read = time.perf_counter()
    trainer.compile()
    compiled = time.perf_counter()
    step_seconds = trainer.probe()
    trainer.restart()
    before = {"reading": read - started, "compiling": compiled - read, "probing": time.perf_counter() - compiled}
    step_tokens = settings.windows_per_step * shape.context
    most_steps = max(int(settings.max_epochs * len(tokens["train"]) / step_tokens), 1)
    left = max(settings.budget_seconds - (time.perf_counter() - started), 1.0)
    print(f"{settings.shape}: {parameters:,} parameters, {'not ' * (trainer.run_block is block)}compiled")
    print(", ".join(f"{name} {value:.1f} s" for name, value in before.items()))
    print(
        f"{step_seconds * 1e3:.1f} ms a step, {step_tokens / step_seconds:,.0f} tokens/s; {left:.0f} s to train: "
        f"about {min(most_steps, int(left / step_seconds)):,} steps, at most {most_steps:,}",
        flush=True,
    )
    curve = trainer.run(most_steps, left, step_seconds, log)
    steps = int(curve[-1]["step"])
    record = {
        "settings": asdict(settings),
        "shape": asdict(shape),
        "parameters": parameters,
        **circumstances(trainer),
        "steps": steps,
        "tokens_seen": steps * step_tokens,
        "epochs": steps * step_tokens / len(tokens["train"]),
        "seconds_before_training": before,
        "training_seconds": curve[-1]["seconds"],
        "milliseconds_per_step": step_seconds * 1e3,
        "curve": curve,
        "corpus": recipe,
    }
    save(trainer.model.cpu(), corpus / "tokenizer.json", output, max_shard_size)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{steps:,} steps; the whole run took {time.perf_counter() - started:.1f} s", flush=True)
    return record


def circumstances(trainer: Trainer) -> dict[str, Any]:
    """Machine, software and memory of a run."""
    cuda = trainer.device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compiled": trainer.run_block is not block,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, help="folder written by corpus.py")
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, as 15MB")
    parser.add_argument("--log-json", type=Path, help="append each point of the loss curve to this file as a JSON line")
    chosen = parser.add_argument_group("settings", "defaults follow the shape")
    chosen.add_argument("--budget-seconds", type=float, help="most time until the last step, compiling included")
    chosen.add_argument("--max-epochs", type=float)
    chosen.add_argument("--windows-per-step", type=int)
    chosen.add_argument("--dropout", type=float)
    chosen.add_argument("--peak-rate", type=float)
    chosen.add_argument("--weight-decay", type=float)
    chosen.add_argument("--balance", type=float, help="load-balancing coefficient")
    chosen.add_argument("--seed", type=int)
    options = vars(parser.parse_args())
    paths = options["corpus"], options["output"], options["max_shard_size"], options["log_json"]
    given = {name: value for name, value in options.items() if name in asdict(DEFAULTS["demo"]) and value is not None}
    train(replace(DEFAULTS[options["shape"]], **given), SHAPES[options["shape"]], *paths)


if __name__ == "__main__":
    main()
