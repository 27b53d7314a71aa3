"""One timeline: the tokens in a KV cache, and the answers that grow it. Floor 3.

A session keeps the longest common prefix of what it holds and what it is asked: a chat of many
turns computes only what is new. The kernels give a token the same bits however the text was cut
into calls, so that a kept prefix changes nothing. `tokens` are exactly the tokens in the KV cache;
a token that was drawn but not yet fed is not among them. A stream that is closed, or interrupted
with Ctrl-C, leaves the session at the last step that was complete.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .meter import Meter
from .runtime.errors import ContextError, UsageError
from .sampling import Choice, Sampler, SamplingParams
from .stats import GenerationStats
from .stop_strings import StopStrings

if TYPE_CHECKING:
    import numpy as np

    from .engine import Engine

# A text is continued as it stands; messages go through the chat template.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
_MIXED = object()  # a routing that no engine has


@dataclass(frozen=True, slots=True)
class Event:
    """One token of an answer. `text` may be empty (part of a character, or held back for a stop
    string) or span several tokens. The last event has a reason and the statistics: "stop" (an end
    token or a stop string) or "length" (max_tokens, or the context is full)."""

    text: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    stats: GenerationStats | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` include an end token; `logprobs` are one Choice per token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[Choice, ...]
    stats: GenerationStats


class Session:
    """A conversation on an engine, for one thread at a time. `close` gives its KV cache back."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self.last_stats: GenerationStats | None = None  # also of an answer that was interrupted
        self._kv_cache = engine.lend_kv_cache(self)
        self._routing: object = engine.routing  # with which all of `tokens` were computed

    @property
    def offset(self) -> int:
        """Number of tokens in the KV cache."""
        return len(self.tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self._keep(0)

    def close(self) -> None:
        """Give the KV cache back to the engine; the session cannot be used after it."""
        if self._kv_cache is not None:
            self._kv_cache = None
            self.tokens = []
            self.engine.return_kv_cache(self)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, prompt: Prompt, **options: Any) -> list[int]:
        """The tokens of a prompt. `options` go to the chat template (tools, enable_thinking, ...).

        Raises UsageError for what cannot be a prompt, TemplateError for what the template does.
        """
        if isinstance(prompt, str):
            ids = self.engine.need_tokenizer().encode(prompt, add_special_tokens=True)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            template = self.engine.chat_template
            ids = template.encode(self.engine.need_tokenizer(), prompt, **options)
        else:
            ids = _token_ids(prompt)
        capacity = self.engine.context
        if not ids:
            raise UsageError("the prompt is empty", "it has no tokens", "give some text")
        if len(ids) > capacity:
            most = self.engine.args.max_context
            raise ContextError(
                f"the prompt has {len(ids)} tokens",
                f"the context holds {capacity}",
                "shorten it"
                + (f", or raise --context (the model takes {most})" if capacity < most else ""),
            )
        return ids

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[Event, None, None]:
        """Answer `prompt`; yields one event per token. Closing the iterator cancels.

        The prompt is checked and encoded here, the model runs as the events are taken.
        """
        start = time.perf_counter()
        self._need_open()
        ids = self.encode(prompt, **options)
        return self._answer(ids, params or SamplingParams(), time.perf_counter() - start)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """The whole answer to `prompt`."""
        params = params or SamplingParams()
        events = list(self.stream(prompt, params, **options))
        drawn = [event for event in events if event.token_id is not None]
        choices = [Choice(e.token_id, e.logprob, e.top_logprobs) for e in drawn]
        return Completion(
            "".join(event.text for event in events),
            tuple(event.token_id for event in drawn),
            events[-1].finish_reason,
            tuple(choices) if params.logprobs else (),
            events[-1].stats,
        )

    def logits(self, prompt: Prompt, **options: Any) -> "np.ndarray":
        """fp32 logits [vocab] of the token after `prompt`; the prompt stays in the KV cache."""
        self._need_open()
        ids = self.encode(prompt, **options)
        return self._prefill(ids)[0]

    def _answer(
        self, ids: list[int], params: SamplingParams, encode_s: float
    ) -> Generator[Event, None, None]:
        self._need_open()
        meter = Meter(self.engine, len(ids), encode_s)
        tokenizer = self.engine.tokenizer
        decoder = tokenizer.stream() if tokenizer else None
        ends = tokenizer.eos_ids if tokenizer else self.engine.eos_ids
        stops = StopStrings(params.stop)
        sampler = Sampler(params, ids)
        meter.seed = sampler.seed if params.temperature > 0 else None
        limit = self.engine.context if params.max_tokens is None else params.max_tokens
        try:
            logits, best_id = self._prefill(ids, meter)[0], None
            meter.prefilled()
            if not limit:
                yield Event("", finish_reason="length", stats=meter.finish())
            while limit:
                choice = sampler.choose(logits, best_id)
                meter.drew_token()
                text, reason, stopped = "", None, False
                if choice.token_id in ends:
                    reason = "stop"
                else:
                    piece = decoder.push(choice.token_id) if decoder else ""
                    text, stopped = stops.push(piece)
                    if stopped:
                        reason = "stop"
                    elif meter.generated_tokens >= limit or self.offset >= self.engine.context:
                        reason = "length"
                if reason and not stopped:
                    rest, stopped = stops.push(decoder.flush() if decoder else "")
                    text += rest if stopped else rest + stops.flush()
                yield Event(
                    text,
                    choice.token_id,
                    choice.logprob,
                    choice.top_logprobs,
                    reason,
                    meter.finish() if reason else None,
                )
                if reason:
                    return
                logits, best_id = self.step(choice.token_id, meter)
        finally:
            self.last_stats = meter.finish()

    def step(self, token_id: int, meter: "Meter | None" = None) -> "tuple[np.ndarray, int | None]":
        """Append one token to the timeline. Returns the fp32 logits [vocab] of the token after it,
        good until the engine's next step, and the lowest id of the largest: -1 where that is not
        finite, None where nobody has looked."""
        engine = self.engine
        if self._kv_cache is None or engine.closed:
            self._need_open()
        if self._routing != engine.routing:  # switched in the middle of an answer
            self._routing = _MIXED
        if engine.charged is not meter:
            engine.charge(meter)
        try:
            result = engine.step(token_id, self._kv_cache)
            self.tokens.append(token_id)
        except BaseException:
            self._keep(len(self.tokens))
            raise
        return result

    # ---- the KV cache and the tokens in it, kept alike -----------------------------------------

    def _prefill(self, ids: list[int], meter: "Meter | None" = None) -> "np.ndarray":
        """Bring the KV cache to `ids`; returns the logits [1, vocab] of the last."""
        kept = 0
        if self._routing != self.engine.routing:
            self._keep(0)
            self._routing = self.engine.routing
        for ours, theirs in zip(self.tokens, ids[:-1], strict=False):  # the last gives the logits
            if ours != theirs:
                break
            kept += 1
        self._keep(kept)
        if meter:
            meter.cached_tokens = kept
        self.engine.make_room(self._kv_cache, len(ids))
        chunk = self.engine.chunk_tokens
        for begin in range(kept, len(ids), chunk):  # an interrupted prompt keeps whole chunks
            part = ids[begin : begin + chunk]
            logits = self._feed(part, "last" if begin + chunk >= len(ids) else "none", meter)
        return logits

    def _feed(self, ids: list[int], logits: str, meter: "Meter | None") -> "np.ndarray":
        if self._routing != self.engine.routing:  # switched in the middle of an answer
            self._routing = _MIXED
        self.engine.charge(meter)
        try:
            result = self.engine.forward(ids, self._kv_cache, logits)
            self.tokens.extend(ids)
        except BaseException:
            self._keep(len(self.tokens))
            raise
        return result

    def _keep(self, length: int) -> None:
        self._need_open()
        length = min(length, self._kv_cache.offset)
        self._kv_cache.trim(length)
        del self.tokens[length:]

    def _need_open(self) -> None:
        if self._kv_cache is None or self.engine.closed:
            raise UsageError("this session is closed", "", "open another with Session(engine)")


def _token_ids(prompt: Any) -> list[int]:
    try:
        ids = [int(i) for i in prompt]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a prompt of type `{type(prompt).__name__}` cannot be meant",
            "expected a text, a list of token ids, or a list of messages",
        ) from error
    return ids
