"""From words and environment variables to the options of one command, and its --help."""

import argparse
import os
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..runtime.errors import UsageError

_KINDS = {int: "a whole number", float: "a number"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UsageError`s, printed like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "", f"see: {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as wide as the terminal; lines that begin with a space stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def filled(paragraph: str) -> str:
            return paragraph if paragraph[:1] == " " else textwrap.fill(paragraph, width)

        return "\n\n".join(map(filled, text.strip("\n").split("\n\n")))


def parse(name: str, about: str, module: Any, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of one command; environment variables fill in what no flag says."""
    parser = Parser(
        prog=f"edgemoe {name}",
        description=getattr(module, "DESCRIPTION", about[0].upper() + about[1:] + "."),
        epilog=getattr(module, "EPILOG", None),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    positionals = [a for a in parser._actions if not a.option_strings]
    words = [f"[{a.metavar}]" if a.nargs == "?" else str(a.metavar) for a in positionals]
    parser.usage = getattr(module, "USAGE", " ".join(["%(prog)s", *words, "[options]"]))
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="more detail on standard error"
    )
    _read_environment(parser)
    # Intermixed: `run MODEL --memory 4GiB "prompt"` has its two positionals apart.
    return parser.parse_intermixed_args(argv)


def variable_of(option: str) -> str:
    """The environment variable of a long option: `--kv-bits` is `EDGEMOE_KV_BITS`."""
    return "EDGEMOE_" + option.lstrip("-").replace("-", "_").upper()


def _read_environment(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        value = os.environ.get(variable_of(long[0])) if long else None
        if value is None or action.dest in ("help", "verbose", "model_option"):
            continue
        variable = variable_of(long[0])
        if action.nargs == 0:
            if value.lower() not in _TRUE + _FALSE:
                raise UsageError(f"`{variable}` is `{value}`", f"expected one of {_TRUE + _FALSE}")
            action.default = value.lower() in _TRUE
        elif value:
            action.default = _converted(action, variable, value)


def _converted(action: argparse.Action, variable: str, value: str) -> Any:
    try:
        result = action.type(value) if callable(action.type) else value
    except UsageError as error:
        raise UsageError(f"`{variable}` is `{value}`", error.why, error.next_step) from error
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        why = f"expected {_KINDS[action.type]}" if action.type in _KINDS else str(error)
        raise UsageError(f"`{variable}` is `{value}`", why) from error
    if action.choices is not None and result not in action.choices:
        choices = ", ".join(str(choice) for choice in action.choices)
        raise UsageError(f"`{variable}` is `{value}`", f"expected one of {choices}")
    return [result] if isinstance(action, argparse._AppendAction) else result
