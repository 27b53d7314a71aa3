"""Train the demo model on the CPU; may be stopped and started again at any time.

The learning rate stays constant and then falls linearly over the last part of the planned minutes,
so that a run ends on time whatever the machine's speed turns out to be. Run it as

    nohup python train.py --data DATA --out RUN --minutes 75 --workers 2 > RUN/stdout 2>&1 &

Several workers of one thread each train on their own rows and average their weights every few
steps. On a busy machine that wastes much less than one worker of several threads, which wait
for each other thousands of times in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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


class Workers:
    """The processes that train together; the first one starts the others."""

    def __init__(self, folder: Path, count: int) -> None:
        import torch.distributed as dist

        self.count, self.rank = count, int(os.environ.get("DEMO_RANK", "0"))
        meeting = folder / "meeting"
        if count == 1:
            return
        if self.rank == 0:
            meeting.unlink(missing_ok=True)
            for rank in range(1, count):
                environment = os.environ | {"DEMO_RANK": str(rank)}
                subprocess.Popen([sys.executable, *sys.argv], env=environment)
        url = meeting.resolve().as_uri()
        dist.init_process_group("gloo", init_method=url, rank=self.rank, world_size=count)

    def average(self, model: Any, progress: float) -> float:
        """Average the weights over the workers; returns the first worker's progress."""
        import torch
        import torch.distributed as dist

        if self.count == 1:
            return progress
        with torch.no_grad():
            flat = torch.cat([p.view(-1) for p in model.parameters()])
            dist.all_reduce(flat)
            flat /= self.count
            for p, part in zip(
                model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
            ):
                p.copy_(part.view(p.shape))
            agreed = torch.tensor([progress], dtype=torch.float64)
            dist.broadcast(agreed, 0)
        return float(agreed)


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
    workers = Workers(args.out, args.workers)
    torch.manual_seed(args.seed)
    compile_parts()
    model = DemoModel(DemoConfig(num_layers=args.layers))
    optimizer = DemoOptimizer(model, args.matrix_lr, args.other_lr)
    data = Rows(args.data, "train")
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
    name = "log.jsonl" if workers.rank == 0 else f"log.{workers.rank}.jsonl"
    log = (args.out / name).open("a", encoding="utf-8")
    progress = 0.0
    while True:
        seconds = before + time.monotonic() - began
        together = step % args.average_every == 0
        if together:
            progress = seconds / (args.minutes * 60)
            if args.tokens:
                progress = max(progress, tokens / args.tokens)
            progress = workers.average(model, progress)
        done = progress >= 1
        due = together and workers.rank == 0
        if due and (done or time.monotonic() - saved > args.save_minutes * 60):
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
        rng = np.random.default_rng([args.seed, step, workers.rank])
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
        step, tokens = step + 1, tokens + rows[:, 1:].numel() * args.workers
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
                "tokens_per_s": round(
                    len(recent) * TOKENS_PER_STEP * args.workers / (now - logged)
                ),
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
    parser.add_argument("--workers", type=int, default=1, help="training processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--average-every", type=int, default=10, help="steps between averages")
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
        args.out.mkdir(parents=True, exist_ok=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    train(args)


if __name__ == "__main__":
    main()
