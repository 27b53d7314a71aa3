"""The command line. A sub-command is one file; it is imported when it is called.

This file imports neither argparse nor anything of ours before a command needs it, so that
`edgemoe --help` answers at once and a table of commands is all there is to read here.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

# name -> (module, one line of help); the module has add_arguments(parser) and run(args) -> int.
# A name of two words, such as `bench io`, wins over its first word.
COMMANDS = {
    "run": (".run", "answer one prompt (from an argument or standard input)"),
    "chat": (".chat", "talk with a model in the terminal"),
    "plan": (".plan", "show what fits into a memory budget, without loading anything"),
    "convert": (".convert", "turn a Hugging Face checkpoint into a store"),
    "calibrate": (".calibrate", "learn what a model's routers do on text"),
    "stand-ins": (".stand_ins", "write second records of a store's experts at fewer bits"),
    "prune": (".prune", "choose the experts that a task needs, as a set beside the store"),
    "inspect": (".inspect", "show what a store holds"),
    "verify": (".verify", "check a store, and that streaming does not change its output"),
    "eval": (".eval", "measure perplexity, and how far two stores are apart"),
    "bench": (".bench", "measure speed, reads and memory at several budgets"),
    "bench io": (".bench_io", "measure how fast records come from storage, and what that costs"),
    "bench kernels": (".bench_kernels", "measure the kernels against the memory; needs no model"),
    "trace record": (".trace_record", "write down which experts a text or a prompt is routed to"),
    "trace replay": (".trace_replay", "recorded routings through policies, pools, predictors"),
    "trace compare": (".trace_compare", "two recorded routings, or two policies on one"),
}
EXIT_INTERRUPTED = 130

_HELP = """usage: edgemoe COMMAND [options]

edgemoe runs mixture-of-experts models that are larger than memory.

commands:
{commands}

options:
  -h, --help     show this help; `edgemoe COMMAND --help`, that of a command
  --version      show the version
  -v, --verbose  more detail on standard error

Every option has an environment variable: --memory, EDGEMOE_MEMORY. A flag wins.
Without a model, run and chat use the small model that comes with edgemoe:
  edgemoe run "What is an expert?"
"""


def help_text() -> str:
    """The text of `edgemoe --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and never raises."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
            setattr(sys, name, open(os.devnull, mode))
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse, after printing --help
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        if _debug():
            raise
        if sys.stderr.isatty():
            print(file=sys.stderr)  # or the shell's prompt stands behind ^C
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left. Point stdout elsewhere, or Python complains while exiting.
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            pass
        return 1
    except Exception as error:
        if _debug():
            raise
        from .render import report_error

        return report_error(error)


def _debug() -> bool:
    return os.environ.get("EDGEMOE_DEBUG", "") not in ("", "0")


def _dispatch(argv: list[str]) -> int:
    verbose = 0
    while argv and argv[0] in ("-v", "--verbose"):
        verbose += 1
        argv.pop(0)
    if not argv:
        print(help_text(), end="", file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help", "help") and not (name == "help" and rest):
        print(help_text(), end="")
        return 0
    if name == "help":
        name, rest = rest[0], [*rest[1:2], "--help"]
    if name == "--version":
        from .. import __version__

        print(f"edgemoe {__version__}")
        return 0
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    module = _module(name)
    from .command_line import parse

    args = parse(name, COMMANDS[name][1], module, rest)
    args.verbose += verbose
    return module.run(args)


def _module(name: str) -> Any:
    if name not in COMMANDS:
        from difflib import get_close_matches

        from ..runtime.errors import UsageError

        kind = "option" if name.startswith("-") else "command"
        close = get_close_matches(name, COMMANDS, 1)
        raise UsageError(
            f"unknown {kind} `{name}`",
            f"did you mean `{close[0]}`?" if close else f"commands: {', '.join(COMMANDS)}",
            "see: edgemoe --help",
        )
    from importlib import import_module

    return import_module(COMMANDS[name][0], __name__)
