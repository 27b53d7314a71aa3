"""`edgemoe calibrate STORE --text FILE`: what a model's routers do on text, kept with the store."""

import argparse
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError, UsageError
from ..runtime.index import STORE_FILE
from ..runtime.outputs import need_place
from . import options
from .render import note, open_output, table

if TYPE_CHECKING:
    from ..engine import Engine

USAGE = "%(prog)s [STORE_OR_CHECKPOINT] --text FILE ... [options]"
EPILOG = """One pass over the text, in the memory given; killed at any moment, the same command goes
on where it was. The profile is STORE/profile.safetensors, or STORE/profiles/NAME.safetensors.
With --holdout FILE its tables are scored on text that they have not seen; without --text, those of
the profile that is there.

  edgemoe calibrate olmoe.edgemoe --text wiki.txt --holdout other.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="STORE_OR_CHECKPOINT", help="default: the bundled model"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", action="append", metavar="FILE", help="a text, or token ids as .npy; repeatable"
    )
    text.add_argument(
        "--holdout", action="append", metavar="FILE", help="score the tables on it; repeatable"
    )
    text.add_argument(
        "--tokens", type=options.count, metavar="N", help="at most, all texts together (50k)"
    )
    text.add_argument(
        "--window", type=options.count, metavar="N", help="tokens of a window (default: 512)"
    )
    out = parser.add_argument_group("profile")
    out.add_argument("--name", metavar="TASK", help="of one task among others")
    out.add_argument("--out", metavar="FILE", help="instead of a file in the store")
    both = out.add_mutually_exclusive_group()
    both.add_argument("--add", action="store_true", help="add the text to the profile there is")
    both.add_argument("--replace", action="store_true", help="start over where there is one")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--memory", type=options.size, metavar="SIZE", help="bound of the whole process"
    )
    group.add_argument("--threads", type=options.count, metavar="N", help="compute threads")
    options.add_numeric_options(group)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    if not args.text and not args.holdout:
        raise UsageError("no --text given", "nothing to calibrate on", "--text FILE")
    source = Path(options.existing(args.model) or options.bundled_model())
    out = _target(source, args)
    open_output()
    with ExitStack() as stack:
        document = _measure(_store(source, stack), out, args, stack)
    print(json.dumps(document, indent=1) if args.json else _text(document))
    return 0


def _target(source: Path, args: argparse.Namespace) -> Path:
    """Where the profile goes. Raises UsageError where it is decided by nothing what happens to one
    that is there."""
    from ..runtime.profile import profile_path

    if args.out is not None:
        out = Path(args.out)
    elif (source / STORE_FILE).is_file():
        out = profile_path(source, args.name)
    else:
        out = source.with_name(f"{source.resolve().name}.{args.name or 'profile'}.safetensors")
    if args.text and out.exists() and not (args.add or args.replace):
        raise UsageError(
            f"there is a profile at `{out}`",
            "its sums would be lost",
            "--add adds this text to it, --replace starts over, --name TASK makes another",
        )
    if args.text:
        need_place(out, makes_folder=True)
    return out


def _store(source: Path, stack: ExitStack) -> Path:
    """`source`, or a store of it with 8-bit experts, which is removed at the end of the run."""
    if (source / STORE_FILE).is_file():
        return source
    from ..quant.convert import convert
    from ..quant.plan import ConvertOptions
    from ..quant.progress import open_progress

    path = source.with_name(f"{source.resolve().name}.calibrate.edgemoe")
    note(f"note: `{source}` is a checkpoint: calibrating on a temporary 8-bit store, `{path}`")
    progress = open_progress()
    try:
        convert(source, path, ConvertOptions(bits=8, trunk_bits=16), progress)
    finally:
        progress.close()
    # Not on an error: a calibration that goes on later needs it again.
    stack.push(lambda kind, *_: shutil.rmtree(path) if kind is None else None)
    return path


def _measure(path: Path, out: Path, args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    from ..models.fingerprint import checkpoint_fingerprint
    from ..quant.calibrate import calibrate, read_texts
    from ..quant.progress import open_progress
    from ..quant.scores import score_profile, usage
    from ..quant.windows import WINDOW_TOKENS
    from ..runtime.profile import Profile

    window = args.window or WINDOW_TOKENS
    engine = stack.enter_context(_open(path, window, args))
    index, progress = engine._index, open_progress()
    stack.callback(progress.close)
    mark = checkpoint_fingerprint(index)
    document: dict[str, Any] = {"store": str(path), "profile": str(out)}
    held = read_texts(args.holdout, engine.tokenizer, args.tokens) if args.holdout else []
    if args.text:
        texts = read_texts(args.text, engine.tokenizer, args.tokens)
        base = Profile.load(out) if args.add and out.exists() else None
        if base is not None:
            base.check_model(index.layer_to_num_experts, engine.args.top_k, mark)
        start = time.monotonic()
        profile = calibrate(
            engine,
            texts,
            out,
            window=window,
            name=args.name,
            fingerprint=mark,
            base=base,
            progress=progress,
        )
        document["seconds"] = time.monotonic() - start
        document["peak_memory_bytes"] = engine.peak_memory_bytes()
    else:
        profile = Profile.load(out)
        profile.check_model(index.layer_to_num_experts, engine.args.top_k, mark)
    document |= {"num_tokens": profile.num_tokens, "texts": profile.texts, "window": window}
    document["layers"] = [row.to_dict() for row in usage(profile)]
    if held:
        from ..quant.passes import Passes, groups
        from ..quant.windows import cut

        windows = [w.ids for text in held for w in cut(text.ids, window)]
        progress.start("score", sum(map(len, windows)), unit="tok")
        passes = Passes(engine)
        routes = [r for group in groups(windows) for r in passes.routes(group, progress.advance)]
        document["recall"] = [r.to_dict() for r in score_profile(profile, routes, windows)]
        document["num_held_out_tokens"] = sum(len(ids) - 1 for ids in windows)
    return document


def _open(path: Path, window: int, args: argparse.Namespace) -> "Engine":
    """An engine for windows of so many tokens, with what the sums need left out of its budget."""
    from ..engine import Engine
    from ..models import parse_config
    from ..quant.calibrate import sums_bytes
    from ..runtime.index import load_index

    given = options.engine_arguments(args) | {"warm_start": "off"}
    if args.memory is not None and args.text:
        reserved = sums_bytes(parse_config(load_index(path).config))
        given["memory"] = max(1, args.memory - reserved)
        try:
            return Engine.from_pretrained(path, context=window, **given)
        except BudgetError as error:
            more = f"of --memory, calibration itself takes {format_bytes(reserved)}; for the rest: "
            raise BudgetError(error.what, more + error.why, error.next_step) from error
    return Engine.from_pretrained(path, context=window, **given)


def _text(document: dict[str, Any]) -> str:
    parts = [_usage_table(document["layers"])]
    if "recall" in document:
        parts.append(_recall_table(document["recall"], document["num_held_out_tokens"]))
    texts = ", ".join(f"{text['name']} ({text['tokens']:,})" for text in document["texts"])
    parts.append(f"{document['num_tokens']:,} tokens of {texts}\nin {document['profile']}")
    if "seconds" in document:
        peak = format_bytes(document["peak_memory_bytes"])
        parts[-1] += f"; {document['seconds']:.1f} s, peak memory {peak}"
    return "\n\n".join(parts)


def _usage_table(layers: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["layer"],
            row["num_experts"],
            f"{row['effective']:.1f}",
            row["unused"],
            *(f"{100 * row[name]:.1f} %" for name in ("most", "top_25", "top_50")),
        )
        for row in layers
    ]
    header = ("layer", "experts", "effective", "unused", "tokens of the top one")
    return table(rows, (*header, "choices of the top 25 %", "top 50 %"))


def _recall_table(scores: list[dict[str, Any]], num_tokens: int) -> str:
    names = list(scores[0]["recall"])
    rows = [
        (s["layer"], s["n"], *(f"{s['recall'][name]:.3f}" for name in names), f"{s['known']:.2f}")
        for s in sorted(scores, key=lambda s: (s["n"], s["layer"]))
    ]
    for n in sorted({s["n"] for s in scores}):
        same = [s for s in scores if s["n"] == n]
        means = (sum(s["recall"][name] for s in same) / len(same) for name in names)
        known = sum(s["known"] for s in same) / len(same)
        rows.append(("all", n, *(f"{mean:.3f}" for mean in means), f"{known:.2f}"))
    head = f"recall of the n likeliest experts on {num_tokens:,} held-out tokens"
    return f"{head}\n{table(rows, ('layer', 'n', *names, 'states known'))}"
