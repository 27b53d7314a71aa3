"""Train the demo model on the CPU; may be stopped and started again at any time.

The learning rate stays constant and then falls linearly over the last part of the planned minutes,
so that a run ends on time whatever the machine's speed turns out to be. Run it as

    nohup python train.py --data DATA --out RUN --minutes 75 > RUN/stdout 2>&1 &
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Big activations are freed and allocated again at every step. Left alone, glibc returns them to the
# system each time, and page faults take most of the step.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "2000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
TOKENS_PER_STEP = 4096
# Of 16 rows: dialogue, code, prose.
ROWS = {"dialogue": 9, "code": 3, "prose": 4}


class Rows:
    """Rows of training tokens, drawn at random from the token files of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self.tokens, self.starts = {}, {}
        for domain in ROWS:
            path = folder / f"{domain}.{split}.bin"
            self.tokens[domain] = np.fromfile(path, dtype=np.uint16)
            self.starts[domain] = np.load(path.with_suffix(".npy"))

    def batch(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`[rows, length + 1]` ids; dialogues begin at a document, code and prose anywhere."""
        rows = []
        for domain, share in ROWS.items():
            tokens, starts = self.tokens[domain], self.starts[domain]
            for _ in range(share * TOKENS_PER_STEP // length // 16):
                last = len(tokens) - length - 1
                at = int(rng.integers(last))
                if domain == "dialogue":
                    at = int(starts[np.searchsorted(starts, at, side="right") - 1])
                rows.append(tokens[at : at + length + 1])
        return np.stack(rows).astype(np.int64)


def loss_weights(targets: np.ndarray, answer: float = 1.5, question: float = 0.3) -> np.ndarray:
    """Weight of every target: answers count more, what the user says counts less.

    Special ids: 0 end of text, 1 system, 2 user, 3 assistant, 4 end (see `tokenizer.py`).
    """
    weights = np.ones(targets.shape, dtype=np.float32)
    position = np.arange(targets.shape[1])
    marks = np.where((targets >= 0) & (targets <= 3), position, -1)
    last = np.maximum.accumulate(marks, axis=1)
    role = np.where(last >= 0, np.take_along_axis(targets, np.maximum(last, 0), axis=1), 0)
    weights[role == 3] = answer
    weights[(role == 1) | (role == 2)] = question
    return weights


def scale_at(progress: float, step: int, decay_from: float) -> float:
    """Relative learning rate: short warm-up, constant, linear to a twentieth."""
    warm = min(1.0, (step + 1) / 100)
    if progress < decay_from:
        return warm
    left = max(0.0, (1 - progress) / (1 - decay_from))
    return warm * (0.03 + 0.97 * left)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary name, then rename it."""
    import torch

    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    """The training loop."""
    import torch
    import torch.nn.functional as F
    from model import DemoConfig, DemoModel, balance_loss, compile_parts
    from optim import DemoOptimizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    compile_parts()
    model = DemoModel(DemoConfig(num_layers=args.layers))
    optimizer = DemoOptimizer(model, args.matrix_lr, args.other_lr)
    data = Rows(args.data, "train")
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    step, tokens, before = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, before = state["step"], state["tokens"], state["seconds"]
        print(f"resumed at step {step}", flush=True)
    began = saved = logged = time.monotonic()
    recent: list[float] = []
    log = (args.out / "log.jsonl").open("a", encoding="utf-8")
    while True:
        seconds = before + time.monotonic() - began
        progress = seconds / (args.minutes * 60)
        if args.tokens:
            progress = max(progress, tokens / args.tokens)
        done = progress >= 1
        if done or time.monotonic() - saved > args.save_minutes * 60:
            saved = time.monotonic()
            save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "tokens": tokens,
                    "seconds": seconds,
                    "num_layers": args.layers,
                },
            )
        if done:
            break
        length = 256 if progress < args.long_from else 512
        rng = np.random.default_rng([args.seed, step])
        batch = data.batch(rng, length)
        weights = torch.from_numpy(loss_weights(batch[:, 1:])).view(-1)
        rows = torch.from_numpy(batch)
        hidden, router_logits, expert_ids = model(rows[:, :-1], torch.bfloat16)
        scores = model.logits(hidden.view(-1, hidden.shape[-1])).float()
        nll = F.cross_entropy(scores, rows[:, 1:].reshape(-1), reduction="none")
        loss = (nll * weights).sum() / weights.sum()
        balance, z = balance_loss(router_logits, expert_ids)
        (loss + args.balance * balance + 1e-4 * z).backward()
        scale = scale_at(progress, step, args.decay_from)
        norm = optimizer.step(scale)
        recent.append(float(loss.detach()))
        step, tokens = step + 1, tokens + rows[:, 1:].numel()
        if step % args.log_every == 0:
            now = time.monotonic()
            record = {
                "step": step,
                "tokens": tokens,
                "minutes": round((before + now - began) / 60, 2),
                "loss": round(sum(recent) / len(recent), 4),
                "by_domain": _by_domain(nll.detach().view(rows[:, 1:].shape), length),
                "balance": round(float(balance.detach()), 3),
                "norm": round(norm, 2),
                "scale": round(scale, 3),
                "tokens_per_s": round(len(recent) * TOKENS_PER_STEP / (now - logged)),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            recent, logged = [], now


def _by_domain(nll: Any, length: int) -> list[float]:
    shares = [share * TOKENS_PER_STEP // length // 16 for share in ROWS.values()]
    return [round(float(part.mean()), 3) for part in nll.split(shares)]


def main() -> None:
    """Read the options, restart under the allocator settings, and train."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--minutes", type=float, default=75.0, help="planned training time")
    parser.add_argument("--tokens", type=int, default=0, help="stop after this many tokens")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--balance", type=float, default=0.01, help="load-balancing coefficient")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=3e-3)
    parser.add_argument("--long-from", type=float, default=0.5, help="progress of 512-token rows")
    parser.add_argument("--decay-from", type=float, default=0.5, help="progress of the decay")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--log-every", type=int, default=20)
    args = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    train(args)


if __name__ == "__main__":
    main()
