"""Options that several commands share, and what a positional means."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..runtime.errors import NotFoundError, UsageError
from ..runtime.sets import SET_MODES
from .routing_options import add_routing_options, routing_argument

POLICIES = ("forecast", "cycle", "lru", "lfu", "fifo")  # the first is the default
PREDICTORS = ("auto", "none", "previous", "profile", "router")
BACKENDS = ("native", "reference")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--memory and what else decides how an engine is opened."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--memory",
        type=size_or_auto,
        metavar="SIZE",
        help="bound of the whole process, such as 4GiB, or auto: as much as is free, and less when "
        "memory gets short (default: what keeps every expert)",
    )
    group.add_argument(
        "--context", type=count, metavar="N", help="tokens the KV cache holds (8k is 8192)"
    )
    group.add_argument(
        "--policy",
        choices=POLICIES,
        default=POLICIES[0],
        help="which expert leaves the expert cache first (default: forecast)",
    )
    add_prefetch_option(group)
    group.add_argument("--threads", type=count, metavar="N", help="compute threads")
    group.add_argument(
        "--warm-start",
        choices=("auto", "off"),
        help="read likely experts while there is nothing else to do (default: auto)",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="instead of the one that came with the model"
    )
    add_set_options(group)
    add_numeric_options(group)
    add_routing_options(parser)


def add_prefetch_option(group: Any) -> None:
    """--prefetch."""
    group.add_argument(
        "--prefetch",
        choices=PREDICTORS,
        help="what predicts the next experts, to read them ahead (default: auto)",
    )


def add_set_options(group: Any) -> None:
    """--set and how it is used."""
    group.add_argument(
        "--set",
        metavar="NAME",
        help="a pruned set of the store; A+B keeps what one of two keeps, 'A&B' what both keep",
    )
    group.add_argument(
        "--set-mode",
        choices=SET_MODES,
        help="exact: same output; soft: others where the router insists; hard: no others "
        "(default: exact)",
    )
    group.add_argument(
        "--set-threshold",
        type=float,
        metavar="X",
        help="soft: share of a token from which the router insists (default: 0.8 / top-k)",
    )


def add_numeric_options(group: Any) -> None:
    """Options that name a numeric path or how the store is read."""
    group.add_argument("--backend", choices=BACKENDS, help="default: native where it was built")
    group.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 16, 32),
        default=16,
        help="KV cache precision: int8, bf16 or fp32 (default: 16)",
    )
    group.add_argument(
        "--io", choices=("auto", "direct", "buffered"), default="auto", help="how experts are read"
    )


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Engine.from_pretrained` that the options name."""
    names = ("memory", "context", "policy", "prefetch", "threads", "backend", "kv_bits", "io")
    names += ("warm_start", "chat_template", "set", "set_mode", "set_threshold")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return given | routing_argument(args)


SAMPLING = {
    "max_tokens": (int, "N", "at most N new tokens (default: 256)"),
    "temperature": (float, "X", "0 is greedy (default: what the model asks for, else 0)"),
    "top_k": (int, "N", "keep the N likeliest tokens (0: all)"),
    "top_p": (float, "X", "keep the likeliest tokens that hold X of the probability"),
    "min_p": (float, "X", "drop tokens below X times the likeliest"),
    "repetition_penalty": (float, "X", "1 is none"),
    "presence_penalty": (float, "X", "0 is none"),
    "frequency_penalty": (float, "X", "0 is none"),
    "seed": (int, "N", "makes sampling repeatable"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    for name, (kind, metavar, about) in SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        flags = ("-n", flag) if name == "max_tokens" else (flag,)
        group.add_argument(*flags, type=kind, metavar=metavar, help=about)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before TEXT (may be repeated)"
    )


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `SamplingParams` that the options name."""
    names = (*SAMPLING, "logprobs")
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    if args.stop:
        given["stop"] = tuple(args.stop)
    return given


def count(text: str) -> int:
    """A positive whole number; `8k` is 8192."""
    scale = 1024 if text[-1:] in ("k", "K") else 1
    try:
        value = int(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got `{text}`")
    return value


def rate(text: str) -> int:
    """`550MB/s` in bytes per second; UsageError for what is no rate."""
    from ..runtime.amounts import parse_rate

    return parse_rate(text)


def rates(text: str) -> list[int]:
    """`50MB/s,550MB/s` in bytes per second."""
    return [rate(word) for word in word_list(text)]


def size(text: str) -> int:
    """`4GiB` in bytes, `auto` as what is free; UsageError for what is no amount of memory."""
    from ..runtime.amounts import parse_bytes
    from ..runtime.pressure import auto_budget

    if text == "auto":
        return auto_budget()
    return parse_bytes(text)


def size_or_auto(text: str) -> int | str:
    """`size`, or `auto` as it stands: for an engine that looks after itself."""
    return text if text == "auto" else size(text)


def counts(text: str) -> list[int]:
    """`1,2` as positive whole numbers."""
    return [count(word) for word in word_list(text)]


def word_list(text: str) -> list[str]:
    """`a,b,c` as a list without empty words."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_model(parser: argparse.ArgumentParser, about: str = "a store (default: bundled)") -> None:
    """The MODEL positional and its unmistakable form."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=about)
    parser.add_argument(
        "-m", "--model", dest="model_option", metavar="STORE", help="the same as MODEL"
    )


def model_path(args: argparse.Namespace) -> str | None:
    """The store to open: MODEL, else --model, else EDGEMOE_MODEL; None is the bundled model."""
    if args.model is not None and args.model_option is not None:
        raise UsageError("two models given", f"`{args.model}` and `{args.model_option}`")
    chosen = args.model if args.model is not None else args.model_option
    return existing(chosen or os.environ.get("EDGEMOE_MODEL") or None)


def existing(
    path: str | None,
    expected: str = "a folder NAME.edgemoe",
    next_step: str = "edgemoe convert HF_DIR --out NAME.edgemoe makes one",
) -> str | None:
    """`path`, which must be there; None stays None."""
    if path is not None and not Path(path).exists():
        raise NotFoundError(f"no model at `{path}`", f"expected {expected}", next_step)
    return path


def bundled_model() -> Path:
    """The store of the model that comes with edgemoe; NotFoundError where it was left out."""
    from ..engine import DEMO

    if not DEMO.is_dir():
        raise NotFoundError(
            "no model given, and none came with this edgemoe",
            f"expected it at `{DEMO}`",
            "name a store: a folder made by edgemoe convert",
        )
    return DEMO


def looks_like_model(text: str) -> bool:
    """Whether a lone positional of `run` is a model: an existing folder, or a NAME.edgemoe."""
    try:
        return text.rstrip("/\\").endswith(".edgemoe") or Path(text).is_dir()
    except (OSError, ValueError):  # longer than a file name can be
        return False
