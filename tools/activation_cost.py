"""What int8 activations cost: perplexity of the native path against fp32 activations.

    python tools/activation_cost.py [STORE] [--text FILE ...] [--tokens 4096]

Both arms compute with the same stored weights: `native` quantizes activations to int8 in groups of
32 columns, `reference` dequantizes the weights and multiplies in fp32. The text is cut into pieces
of at most one context, which are read with teacher forcing. Without --text it is prose of the bench
and files of this repository, none of which the bundled model was trained on.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch

from edgemoe import Engine
from edgemoe.cli.text import TEXT
from edgemoe.kv_cache import KVCache

PIECE_TOKENS = 512
ROOT = Path(__file__).resolve().parent.parent
FILES = ("docs/store.md", "docs/memory.md", "runtime/format.py", "runtime/budget.py")


def built_in_texts() -> list[str]:
    """The prose of `bench`, two pages and two modules."""
    return [TEXT, *((ROOT / name).read_text(encoding="utf-8") for name in FILES)]


def pieces(engine: Engine, texts: list[str], num_tokens: int) -> list[list[int]]:
    """Token ids in pieces of at most one context, the same share of every text.

    `num_tokens` in all, or less where a text is shorter than its share.
    """
    size = min(PIECE_TOKENS, engine.context)
    tokenizer = engine.need_tokenizer()
    found = []
    for text in texts:
        ids = tokenizer.encode(text)[: num_tokens // len(texts)]
        found += [ids[at : at + size] for at in range(0, len(ids), size)]
    return [ids for ids in found if len(ids) > 1]


def losses(engine: Engine, samples: list[list[int]]) -> torch.Tensor:
    """Negative log-likelihood of each predicted token, float64 [tokens]."""
    found = []
    for ids in samples:
        kv_cache = KVCache.for_model(engine.args, engine.context, 32)
        logits = engine.forward(ids, kv_cache, "all")[:-1].double()
        targets = torch.tensor(ids[1:])
        found.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(found)


def measure(store: str | None, texts: list[str], num_tokens: int) -> dict[str, float]:
    """Both perplexities, the rise in percent, and its standard error over tokens."""
    with Engine.from_pretrained(store, backend="native") as engine:
        samples = pieces(engine, texts, num_tokens)
        native = losses(engine, samples)
    with warnings.catch_warnings(), Engine.from_pretrained(store, backend="reference") as engine:
        warnings.simplefilter("ignore")
        exact = losses(engine, samples)
    change = native - exact  # paired by token
    return {
        "num_tokens": len(native),
        "native": math.exp(native.mean()),
        "reference": math.exp(exact.mean()),
        "rise_percent": 100 * math.expm1(change.mean()),
        "standard_error_percent": 100 * float(change.std()) / math.sqrt(len(change)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", help="default: the bundled model")
    parser.add_argument("--text", action="append", type=Path, help="default: built-in texts")
    parser.add_argument("--tokens", type=int, default=4096, help="default: 4096")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in args.text or ()] or built_in_texts()
    result = measure(args.store, texts, args.tokens)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['num_tokens']} tokens: perplexity {result['native']:.3f} with int8 activations, "
        f"{result['reference']:.3f} with fp32: {result['rise_percent']:+.2f} % "
        f"(standard error {result['standard_error_percent']:.2f})"
    )


if __name__ == "__main__":
    main()
