"""What int8 activations cost: perplexity of the native path against fp32 activations.

    python tools/activation_cost.py [STORE] [--text FILE ...] [--tokens 4096]

Both arms compute with the same stored weights: `native` quantizes activations to int8 in groups of
32 columns, `reference` dequantizes the weights and multiplies in fp32. Without --text it is prose
of the bench and files of this repository, none of which the bundled model was trained on.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

from edgemoe import Engine
from edgemoe.cli.text import TEXT
from edgemoe.quant.evaluate import Figures, evaluate
from edgemoe.quant.windows import WINDOW_TOKENS, share

ROOT = Path(__file__).resolve().parent.parent
FILES = ("docs/store.md", "docs/memory.md", "runtime/format.py", "runtime/budget.py")


def built_in_texts() -> list[str]:
    """The prose of `bench`, two pages and two modules."""
    return [TEXT, *((ROOT / name).read_text(encoding="utf-8") for name in FILES)]


def measure(store: str | None, texts: list[str], num_tokens: int) -> Figures:
    """The native path beside fp32 activations, over the same windows."""
    with (
        warnings.catch_warnings(),
        Engine.from_pretrained(store, backend="native") as native,
        Engine.from_pretrained(store, backend="reference") as reference,
    ):
        warnings.simplefilter("ignore")
        encode = native.need_tokenizer().encode
        size = min(WINDOW_TOKENS, native.context)
        windows = share([encode(text) for text in texts], num_tokens, size)
        return Figures.of(evaluate(native, windows, reference))


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
        print(json.dumps(asdict(result)))
        return
    print(
        f"{result.num_tokens} tokens: perplexity {result.perplexity:.3f} with int8 activations, "
        f"{result.other_perplexity:.3f} with fp32: {result.rise_percent:+.2f} % "
        f"(standard error {result.rise_error_percent:.2f}), KL {result.kl:.5f}"
    )


if __name__ == "__main__":
    main()
