"""What people read: errors, notes, tables, sizes, the line under an answer."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, TextIO

from ..runtime.errors import EdgeMoeError, FormatError, UsageError

# For errors that do not say themselves what to do.
_NEXT: dict[type, str] = {
    UsageError: "edgemoe COMMAND --help lists what can be given",
    FormatError: "it is damaged: copy it again, or make it again",
}


def report_error(error: Exception, default_step: str = "") -> int:
    """Print what, why and what next, one line each, on standard error; returns the exit code.

    `default_step`: what to do next, for errors that do not say so themselves.
    """
    if isinstance(error, EdgeMoeError):
        what, why, next_step, code = error.what, error.why, error.next_step, error.exit_code
    else:
        what, why, next_step, code = _foreign(error)
    next_step = next_step or default_step or _NEXT.get(type(error), "")
    lines = [f"edgemoe: {one_line(what)}"]
    table = getattr(error, "table", None)  # a floor, line by line
    if table:
        lines += ["  why:  it needs", *(f"    {line}" for line in table)]
    elif why:
        lines.append(f"  why:  {one_line(why)}")
    lines += [f"  next: {one_line(next_step)}"] if next_step else []
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass
    return code


def _foreign(error: Exception) -> tuple[str, str, str, int]:
    debug = "EDGEMOE_DEBUG=1 shows where it happened"
    if isinstance(error, FileNotFoundError):
        return f"`{error.filename}` is not there", "", "check the path", 4
    if isinstance(error, MemoryError):
        return "out of memory", str(error), "give a smaller --memory or --context", 1
    if isinstance(error, OSError):
        name = f"`{error.filename}`: " if error.filename else ""
        step, code = debug, 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            step, code = "free some disk space", 3
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            step = "check its permissions, or name another place"
        return f"{name}{error.strerror or error}", "the operating system refused", step, code
    return f"internal error: {type(error).__name__}", str(error), debug, 1


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, so that a name cannot draw on a screen."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Part of an answer, at once. A terminal gets no control characters: a model could be made to
    write into the title bar, or over what is on the screen."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or ord(c) >= 32 and not 127 <= ord(c) < 160)
    sys.stdout.write(text)
    sys.stdout.flush()


def open_output() -> None:
    """Let standard output carry any character, whatever the terminal's encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def dim(text: str, stream: TextIO) -> str:
    """`text` in faint letters where the stream is a terminal that may have colour."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"


@contextmanager
def loading() -> Iterator[None]:
    """`loading ...` on a terminal that can take it back at the end of the block."""
    text = dim("loading ...", sys.stderr)
    if text.startswith("\x1b"):
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if text.startswith("\x1b"):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def table(
    rows: Sequence[Sequence[Any]],
    header: Sequence[str],
    text: Sequence[int] = (0,),
    width: int | None = None,
) -> str:
    """Rows under a header; the columns numbered in `text` flush left, the others flush right.

    What is wider than `width` (None: than the terminal, if standard output is one) goes on below,
    in a further table that begins with the first column again.
    """
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = {i % len(header) for i in text}
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    blocks = [[0]]
    for i in range(1, len(header)):
        if len(blocks[-1]) > 1 and sum(2 + widths[j] for j in [*blocks[-1], i]) - 2 > width:
            blocks.append([0])
        blocks[-1].append(i)
    out = []
    for block in blocks:
        part = [
            "  ".join(
                line[i].ljust(widths[i]) if i in left else line[i].rjust(widths[i]) for i in block
            ).rstrip()
            for line in lines
        ]
        part.insert(1, "  ".join("-" * widths[i] for i in block))
        out.append("\n".join(part))
    return "\n\n".join(out)


def markdown(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)


def output_hash(token_ids: Sequence[int]) -> str:
    """16 hexadecimal digits that two runs share when they produced the same tokens."""
    import hashlib
    from array import array

    words = array("i", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]


def model_name(engine: Any) -> str:
    """The store's folder name without its ending."""
    return engine.path.name.removesuffix(".edgemoe")


def print_notes(engine: Any, verbose: int) -> None:
    """What the engine could not do as asked, one line each; with -v, all it reports."""
    report = engine.report()
    for line in report.get("notes", ()):
        note(f"note: {line}")
    if verbose:
        for name, value in report.items():
            if name != "notes":
                note(f"{name}: {value}")


def as_json(value: Any) -> Any:
    """Dataclasses, tuples and paths as what the json module writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
