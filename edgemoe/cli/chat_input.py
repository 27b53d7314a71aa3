"""Reading a turn: a line, or several between triple quotes; from a terminal or a pipe."""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

PROMPT, MORE = ">>> ", "... "
FENCE = '"""'


def read_turn(read: Callable[[str], str] | None = None) -> str | None:
    """The next turn without its fences; None at the end of input."""
    read = read or _reader()
    try:
        line = read(PROMPT)
    except EOFError:
        return None
    if not line.lstrip().startswith(FENCE):
        return line
    text = line.lstrip().removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        try:
            text += "\n" + read(MORE)
        except EOFError:
            return text.strip("\n") or None
    return text.rstrip().removesuffix(FENCE).strip("\n")


@cache
def _reader() -> Callable[[str], str]:
    if not sys.stdin.isatty():
        return _read_pipe
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            return _editor().prompt
        except ImportError:
            pass
    try:
        import readline  # noqa: F401  arrow keys and history in input()
    except ImportError:
        pass
    return input if sys.stdout.isatty() else _read_terminal


def _editor() -> Any:
    """A prompt_toolkit session; ImportError without that library."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    bindings = KeyBindings()

    # A pasted colour such as ESC[31m looks like a mouse click, and the default handler fails on it.
    @bindings.add(Keys.Vt100MouseEvent, eager=True)
    def _(event: Any) -> None:
        pass

    return PromptSession(key_bindings=bindings)


def _read_pipe(prompt: str) -> str:
    """A line of a pipe; bytes that are no UTF-8 become replacement characters."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _read_terminal(prompt: str) -> str:
    # input() would write its prompt into the file that standard output is.
    print(prompt, end="", file=sys.stderr, flush=True)
    return _read_pipe(prompt)
