"""The prompts of `bench`: one for each round, the same for every arm."""

import argparse
import random
from pathlib import Path

from ..runtime.errors import UsageError
from ..runtime.index import StoreIndex
from .decode import text_tokens

PROMPT_TOKENS = 512


def prompt_length(index: StoreIndex, args: argparse.Namespace) -> int:
    """The usual length of a prompt, or what the context leaves beside the decoded tokens."""
    from ..models import parse_config

    room = (args.context or parse_config(index.config).max_context) - args.tokens
    return min(PROMPT_TOKENS, room) if room > 0 else PROMPT_TOKENS  # too long is refused later


def make_prompts(
    path: Path, index: StoreIndex, args: argparse.Namespace
) -> tuple[list[list[int]], str]:
    """`args.repeats` prompts of `args.prompt_tokens` token ids, and what to say about them."""
    from ..models import parse_config
    from ..tokenizer import Tokenizer

    if args.prompts == "random":
        generator, vocab = random.Random(0), parse_config(index.config).vocab
        prompts = [
            [generator.randrange(vocab) for _ in range(args.prompt_tokens)]
            for _ in range(args.repeats)
        ]
        return prompts, "random tokens: hits and stalls are not those of text"
    tokenizer = Tokenizer.load(path)
    if tokenizer is None:
        raise UsageError(
            "no real prompts without a tokenizer", f"`{path}` has none", "use --prompts random"
        )
    from ..quant.windows import read_text
    from .text import TEXT

    text = TEXT
    if args.text is not None:
        text = read_text(Path(args.text))
    num_tokens = len(tokenizer.encode(text))
    if not num_tokens:
        raise UsageError(f"`{args.text}` holds no text")
    step = max(1, num_tokens // args.repeats)
    prompts = [
        text_tokens(tokenizer, text, args.prompt_tokens, turn * step)
        for turn in range(args.repeats)
    ]
    origin = "the built-in text" if args.text is None else args.text
    again = ", repeated" if num_tokens < args.prompt_tokens else ""
    return prompts, f"{origin} of {num_tokens} tokens{again}, from another place each round"
