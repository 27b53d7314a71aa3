"""`edgemoe run [MODEL] [PROMPT]`: one answer on standard output, everything else beside it."""

import argparse
import sys
from typing import Any

from ..runtime.errors import UsageError
from . import options
from .render import (
    as_json,
    dim,
    loading,
    model_name,
    note,
    open_output,
    output_hash,
    print_notes,
    write_answer,
)

EPILOG = """A single argument is the model when it names a folder or ends with .edgemoe, otherwise
it is the prompt for the bundled model. --model removes the doubt.

  edgemoe run "What is an expert?"
  edgemoe run NAME.edgemoe "Tell me a story." --memory 4GiB --temperature 0.7
  edgemoe run NAME.edgemoe < question.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--stats", action="store_true", help="speed and memory on standard error")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: also the N likeliest tokens of each"
    )
    options.add_sampling_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    path = options.model_path(args)
    if args.raw and args.system is not None:
        raise UsageError("--system has no place in a raw prompt", "--raw uses no chat template")
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs needs --json", "text alone has no room for them")
    open_output()
    from ..engine import Engine
    from ..sampling import SamplingParams
    from ..session import Session

    given = options.sampling_arguments(args)
    SamplingParams(**given)  # a wrong value is refused before the model is loaded
    request: str | list[dict[str, str]] = prompt
    if not args.raw:
        request = [{"role": "user", "content": prompt}]
        if args.system is not None:
            request.insert(0, {"role": "system", "content": args.system})
    with loading():
        opened = Engine.from_pretrained(path, **options.engine_arguments(args))
    with opened as engine:
        print_notes(engine, args.verbose)
        params = SamplingParams.from_config(engine.generation_config, **given)
        session = Session(engine)
        if args.json:
            _print_json(engine, session.generate(request, params), args)
        else:
            _print_text(engine, session.stream(request, params), args)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """The prompt; moves a lone positional from MODEL to PROMPT where it is one."""
    if args.model is not None and args.prompt is None:
        if args.model_option is not None or not options.looks_like_model(args.model):
            args.model, args.prompt = None, args.model
    if args.prompt is not None and args.prompt != "-":
        text = args.prompt
    elif args.prompt is None and sys.stdin.isatty():
        raise UsageError(
            "no prompt", "standard input is a terminal", "give one in quotes, or: edgemoe chat"
        )
    else:
        text = _read_stdin()
    if not text.strip():
        raise UsageError("the prompt is empty", "", "give some text")
    return text


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError("standard input is not UTF-8 text", str(error)) from error


def _print_text(engine: Any, events: Any, args: argparse.Namespace) -> None:
    stats, reason, text = None, None, ""
    for event in events:
        text = event.text or text
        write_answer(event.text)
        stats, reason = event.stats or stats, event.finish_reason or reason
    if not text.endswith("\n"):
        write_answer("\n")
    if reason == "length" and args.max_tokens is None:
        note(dim("(cut at the default length; --max-tokens N allows more)", sys.stderr))
    if stats is not None and (args.stats or args.verbose):
        note(dim(stats.footer(), sys.stderr))


def _print_json(engine: Any, completion: Any, args: argparse.Namespace) -> None:
    import json

    document: dict[str, Any] = {
        "model": model_name(engine),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "output_hash": output_hash(completion.token_ids),
        "stats": completion.stats.to_dict(),
        "engine": as_json(engine.report()),
    }
    if args.logprobs is not None:
        document["logprobs"] = as_json(completion.logprobs)
    print(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False))
