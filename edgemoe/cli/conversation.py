"""The state behind `edgemoe chat`: messages, sampling, totals. Knows no terminal."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..runtime.errors import UsageError
from .options import SAMPLING


class Conversation:
    """Messages and the session that answers them."""

    def __init__(self, engine: Any, params: Any, system: str | None = None) -> None:
        from ..session import Session

        self.engine, self.params, self.system = engine, params, system
        self.session = Session(engine)
        self.messages: list[dict[str, str]] = []
        self.stats: Any = None  # of the last answer
        self.finish_reason: str | None = None
        self.totals = dict.fromkeys(("turns", "tokens", "hits", "misses", "bytes_read"), 0)

    def ask(self, text: str) -> None:
        """Append what the user says."""
        self.messages.append({"role": "user", "content": text})

    def clear(self) -> None:
        """Forget the messages; the system message stays."""
        self.messages.clear()
        self.session.reset()
        self.stats = None

    def take_back_answer(self) -> None:
        """Forget the last answer, so that the last question is answered again."""
        if not any(message["role"] == "user" for message in self.messages):
            raise UsageError("nothing to answer again", "no question has been asked yet")
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        if self.params.seed is not None:  # the same seed would give the same answer
            self.params = replace(self.params, seed=self.params.seed + 1)

    def set(self, name: str, value: str) -> None:
        """Change one sampling parameter."""
        name = name.replace("-", "_")
        if name not in SAMPLING and name != "stop":
            raise UsageError(f"unknown setting `{name}`", f"settings: {', '.join(SAMPLING)}, stop")
        try:
            if name == "stop":
                parsed: Any = (value,) if value else ()
            elif name == "seed" and value == "none":
                parsed = None
            else:
                parsed = SAMPLING[name][0](value)
        except ValueError as error:
            kind = "a whole number" if SAMPLING[name][0] is int else "a number"
            raise UsageError(f"`{name}` cannot be `{value}`", f"expected {kind}") from error
        self.params = replace(self.params, **{name: parsed})

    def stream(self) -> Iterator[Any]:
        """Answer the last question; keeps what was said, also when it is closed or interrupted."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.stats, self.finish_reason = None, None
        said: list[str] = []
        try:
            events = self.session.stream([*head, *self.messages], self.params)
            try:
                for event in events:
                    said.append(event.text)
                    self.finish_reason = event.finish_reason
                    yield event
            finally:
                events.close()
                self.stats = self.session.last_stats
        finally:
            self._keep("".join(said))

    def limit(self) -> str:
        """What ended an answer that was cut, and what to do about it."""
        if self.session.offset < self.engine.context:
            return "at its length limit; /set max_tokens N allows more"
        return f"where {self.engine.context} tokens of context end; /clear starts anew"

    def _keep(self, text: str) -> None:
        if text:
            self.messages.append({"role": "assistant", "content": text})
        elif self.finish_reason is None:
            self.messages.pop()  # refused or stopped at once: the question was never answered
        if self.stats is not None:
            self.totals["turns"] += self.stats.generated_tokens > 0
            self.totals["tokens"] += self.stats.generated_tokens
            for name in ("hits", "misses", "bytes_read"):
                self.totals[name] += getattr(self.stats, name)
