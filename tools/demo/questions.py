"""Held-out questions with the answers that are expected, grouped for the evaluation.

As a program, some of them in long conversations: `python questions.py --out questions.jsonl`, the
file that `edgemoe bench --sets` asks of the bundled model (`--questions`, docs/sets.md).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import chitchat
import product
import stories
import tasks
import topics
from dialogues import REFUSAL, SYSTEMS, Message, held_out

Case = tuple[list[Message], str]


def _single(question: str, answer: str, rng: random.Random) -> Case:
    messages = [{"role": "user", "content": question}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return messages, answer


def _held(entries: list[topics.Entry], rng: random.Random, count: int) -> list[Case]:
    # An entry with no other wording was trained with the one it has.
    asked = [e for e in entries if not all(held_out(q) for q in e.questions)]
    pairs = [(q, e.answer) for e in asked for q in e.questions if held_out(q)]
    rng.shuffle(pairs)
    return [_single(q, a, rng) for q, a in pairs[:count]]


def _remember(rng: random.Random, between: list[tuple[str, str]]) -> Case:
    """Tell a made-up name, ask one held-out thing, and ask for the name."""
    name = "".join(rng.choice(stories.SYLLABLES) for _ in range(3)).capitalize()
    turns = [(f"My name is {name}.", f"Nice to meet you, {name}."), rng.choice(between)]
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": "What is my name?"})
    return messages, f"Your name is {name}."


def groups(count: int, seed: int) -> dict[str, list[Case]]:
    """Up to `count` cases for each kind of question.

    "Held out" means that this wording of the question was never trained on; its fact was, in other
    words. The other kinds are drawn anew, but parts of them may have been seen.
    """
    rng = random.Random(f"evaluate-{seed}")
    sums = [e for e in topics.arithmetic() if e.topic in ("plus", "minus", "times")]
    facts = topics.everyday()
    known = [topics.Entry("edgemoe", asks, answer) for asks, answer in product.blocks()]
    out = {
        "arithmetic, held out": _held(sums, rng, count),
        "everyday facts, held out": _held(facts, rng, count),
        "edgemoe and MoE, held out": _held(known, rng, count),
    }
    # Few of these have paraphrases that are held out; so the first, taught one of each as well.
    out["edgemoe and MoE, taught"] = [_single(e.questions[0], e.answer, rng) for e in known]
    # A follow-up on the same topic ("And of Italy?"): the topic stands in the turn before only.
    follow: list[Case] = []
    for _ in range(count):
        first = rng.choice([e for e in facts + sums if e.follow])
        then = rng.choice([e for e in facts + sums if e.topic == first.topic and e.follow])
        messages, _ = _single(first.questions[0], "", rng)
        messages.append({"role": "assistant", "content": first.answer})
        messages.append({"role": "user", "content": then.follow[0]})
        follow.append((messages, then.answer))
    out["follow-up in context"] = follow
    between = [(e.questions[0], e.answer) for e in facts + sums]
    out["name remembered"] = [_remember(rng, between) for _ in range(count)]
    greeted = [stories.new_name(rng) for _ in range(count)]
    out["name greeted"] = [
        _single(f"My name is {name}.", f"Nice to meet you, {name}.", rng) for name in greeted
    ]
    judged = [tasks.yes_no(rng) for _ in range(count)]
    out["yes or no"] = [_single(rng.choice(e.questions), e.answer, rng) for e in judged]
    asked = {chitchat.unknown(rng) for _ in range(20 * count)}
    refused = sorted(q for q in asked if held_out(q))
    rng.shuffle(refused)
    out["refusal, held out"] = [_single(q, REFUSAL, rng) for q in refused[:count]]
    return out


def conversations(count: int, seed: int) -> list[dict[str, object]]:
    """Each seven held-out wordings and one question about edgemoe that was taught, in any order:
    the longest answers are to those, and few of them have a wording that was left out."""
    rng = random.Random(f"conversations-{seed}")
    pools = groups(10_000, seed)
    kinds = {"arithmetic": 60, "everyday facts": 60, "refusal": 20}
    short = [
        (messages[-1]["content"], answer)
        for name, most in kinds.items()
        for messages, answer in pools[f"{name}, held out"][:most]
    ]
    known = [(m[-1]["content"], answer) for m, answer in pools["edgemoe and MoE, taught"]]
    found = []
    for _ in range(count):
        turns = [*rng.sample(short, 7), rng.choice(known)]
        rng.shuffle(turns)
        found.append({"turns": [{"question": q, "answer": a} for q, a in turns]})
    return found


def main() -> None:
    """Write conversations as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    lines = (json.dumps(each) for each in conversations(args.count, args.seed))
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
