"""How a long job tells how far it is: a bar on a terminal, a line every 5 seconds elsewhere.

Always on stderr, so that answers on stdout stay clean. Knows phases and how much of each is done,
in bytes unless another unit is named.
"""

import sys
import time
from typing import Any, Protocol, TextIO

LINE_EVERY_S = 5.0


class Progress(Protocol):
    """What long jobs report to. Phases follow each other; `note` is one line for people."""

    def start(self, phase: str, total_bytes: int, done_bytes: int = 0, unit: str = "B") -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def note(self, line: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Reports nothing: for programs and tests."""

    def start(self, phase: str, total_bytes: int, done_bytes: int = 0, unit: str = "B") -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class PlainLines:
    """One line every `LINE_EVERY_S`, and at the end of a phase."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase, self._unit = "", "B"
        self._total = self._done = self._first = 0
        self._shown = -1
        self._began = self._printed = 0.0

    def start(self, phase: str, total_bytes: int, done_bytes: int = 0, unit: str = "B") -> None:
        self._finish()
        self._phase, self._total, self._unit = phase, total_bytes, unit
        self._done = self._first = done_bytes
        self._shown = -1
        self._began = self._printed = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() - self._printed >= LINE_EVERY_S:
            self._print()

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._phase and self._shown != self._done:
            self._print()
        self._phase = ""

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        rate = (self._done - self._first) / max(1e-9, self._printed - self._began)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        digits = 2 if scale > 1 and self._total < 1e6 else 0
        text = f"{self._phase}: {self._done / scale:,.{digits}f}"
        text += f" of {self._total / scale:,.{digits}f} {unit}, "
        text += f"{rate / scale:,.{2 if rate < scale else 0}f} {unit}/s"
        if self._done < self._total and round(left):
            text += f", {_clock(left)} left"
        print(text, file=self._stream, flush=True)


class Bar:
    """A rich progress bar: how much, rate and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            _in_unit(progress.DownloadColumn()),
            _in_unit(progress.TransferSpeedColumn(), rate=True),
            progress.TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task: Any = None

    def start(self, phase: str, total_bytes: int, done_bytes: int = 0, unit: str = "B") -> None:
        if self._task is None:
            self._bar.start()
        self._task = self._bar.add_task(phase, total=total_bytes, unit=unit)
        # Work of an earlier run: shown, but not counted as speed.
        self._bar.reset(self._task, total=total_bytes, completed=done_bytes)

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)

    def note(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def _in_unit(column: Any, rate: bool = False) -> Any:
    """A column of bytes that shows plain counts for tasks in another unit."""
    from rich.text import Text

    in_bytes = column.render

    def render(task: Any) -> Any:
        unit = task.fields["unit"]
        if unit == "B":
            return in_bytes(task)
        if rate:
            return Text(f"{task.finished_speed or task.speed or 0:,.0f} {unit}/s")
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} {unit}")

    column.render = render
    return column


def open_progress(stream: TextIO | None = None) -> Progress:
    """A bar where `stream` (stderr by default) is a terminal, plain lines otherwise."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else PlainLines(stream)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
