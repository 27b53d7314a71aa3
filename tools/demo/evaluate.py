"""Measure an exported demo model: perplexity, exact match on held-out questions, expert usage."""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOMAINS
from dialogues import Message
from export import load_folder
from model import DemoModel
from questions import groups
from tokenizer import END, END_OF_TEXT, render
from tokenizers import Tokenizer
from torch import Tensor

LENGTH = 512


@torch.no_grad()
def held_out_pass(model: DemoModel, data: Path, domain: str, limit: int) -> tuple[float, Tensor]:
    """Perplexity of a domain's held-out tokens, and how often each expert `[L, E]` was picked."""
    tokens = np.fromfile(data / f"{domain}.held.bin", dtype=np.uint16).astype(np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    rows = rows[:: max(1, len(rows) * LENGTH // limit)]
    usage = torch.zeros(model.cfg.num_layers, model.cfg.num_experts)
    total, count = 0.0, 0
    for batch in rows.split(4):
        hidden, _, expert_ids = model(batch)
        scores = model.logits(hidden[:, :-1])
        nll = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total, count = total + float(nll), count + batch[:, 1:].numel()
        for layer, ids in enumerate(expert_ids):
            usage[layer] += torch.bincount(ids.flatten(), minlength=usage.shape[1])
    return math.exp(total / count), usage / usage.sum(1, keepdim=True)


@torch.no_grad()
def generate(
    model: DemoModel, tokenizer: Tokenizer, prompts: list[list[Message]], limit: int = 96
) -> list[str]:
    """Greedy answers to several prompts; prompts of one length are decoded together."""
    stops = {tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)}
    by_length: dict[int, list[int]] = collections.defaultdict(list)
    encoded = [tokenizer.encode(render(p, prompt=True)).ids for p in prompts]
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
    answers = [""] * len(prompts)
    for length, members in by_length.items():
        rows = torch.tensor([encoded[i] for i in members])
        going = set(range(len(members)))
        while going and rows.shape[1] < length + limit:
            hidden, _, _ = model(rows)
            picked = model.logits(hidden[:, -1]).argmax(-1)
            rows = torch.cat((rows, picked[:, None]), dim=1)
            going -= {j for j in going if int(picked[j]) in stops}
        for j, i in enumerate(members):
            new = rows[j, length:].tolist()
            cut = next((k for k, t in enumerate(new) if t in stops), len(new))
            answers[i] = tokenizer.decode(new[:cut], skip_special_tokens=False)
    return answers


def _distance(a: Tensor, b: Tensor) -> float:
    """Total variation distance of two usage tables, mean over the layers (0 equal, 1 disjoint)."""
    return float((a - b).abs().sum(1).mean() / 2)


def routing(usage: dict[str, Tensor], top: int = 8) -> dict[str, object]:
    """How far the domains differ in the experts that they use."""
    mean = torch.stack(list(usage.values())).mean(0)
    even = 1 / mean.shape[1]
    pairs = {}
    for a, b in itertools.combinations(usage, 2):
        shared = [
            len(set(x.topk(top).indices.tolist()) & set(y.topk(top).indices.tolist()))
            for x, y in zip(usage[a], usage[b], strict=True)
        ]
        pairs[f"{a}/{b}"] = {
            "distance": round(_distance(usage[a], usage[b]), 3),
            f"shared_of_top_{top}": round(sum(shared) / len(shared), 2),
        }
    share = {d: round(float(u.topk(top).values.sum(1).mean()), 3) for d, u in usage.items()}
    entropy = -(mean * mean.clamp_min(1e-9).log()).sum(1).mean() / math.log(mean.shape[1])
    return {
        "pairs": pairs,
        f"share_of_top_{top}": share,
        "even_share": round(top * even, 3),
        "usage_entropy": round(float(entropy), 3),
        "experts_below_a_tenth_of_even": int((mean < even / 10).sum()),
    }


def main() -> None:
    """Print the figures, and write them as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--questions", type=int, default=150, help="cases of each kind, at most")
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens per domain")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_folder(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    result: dict[str, dict[str, object]] = {"perplexity": {}, "exact_match": {}}
    usage = {}
    for domain in DOMAINS:
        perplexity, usage[domain] = held_out_pass(model, args.data, domain, args.tokens)
        result["perplexity"][domain] = round(perplexity, 2)
        print(f"perplexity {domain}: {perplexity:.2f}", flush=True)
    result["routing"] = routing(usage)
    print(json.dumps(result["routing"], indent=2), flush=True)
    for name, cases in groups(args.questions, args.seed).items():
        answers = generate(model, tokenizer, [messages for messages, _ in cases])
        right = 0
        for (messages, expected), answer in zip(cases, answers, strict=True):
            right += answer == expected
            if answer != expected:
                print(f"  {messages[-1]['content']} -> {answer!r}, expected {expected!r}")
        result["exact_match"][name] = f"{right}/{len(cases)}"
        print(f"exact match {name}: {right}/{len(cases)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
