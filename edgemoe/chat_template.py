"""Chat templates: messages become one prompt. Floor 3; knows no model.

A template is rendered in a worker process (template_worker.py) under a time limit, an output cap
and, where the system has one, an address-space limit; a worker that breaks one is killed and the
next render starts a fresh one. Control tokens inside the users' strings are encoded as plain text
(control_tokens.py).
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .control_tokens import encode_marked, mark_control_tokens
from .runtime.errors import NotFoundError, TemplateError, UsageError
from .tokenizer_files import read_json, token_text

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

RENDER_LIMIT_S = 2.0
START_LIMIT_S = 30.0  # a cold disk under load; nothing hostile runs before the worker is ready

_NEXT_STEP = "use another template with --chat-template FILE, or none with edgemoe run --raw"
_WHAT = {
    "raised": "the chat template refuses these messages",
    "security": "the chat template tries to leave its sandbox",
    "syntax": "the chat template does not parse",
    "memory": "the chat template wants too much memory",
    "failed": "the chat template failed",
    "import": "chat templates need jinja2",
}


class TemplateWorker:
    """The rendering process, started by the first render and kept for the next ones."""

    def __init__(self, limit_s: float = RENDER_LIMIT_S) -> None:
        self.limit_s = limit_s
        self.note = ""  # what could not be limited on this system
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    @property
    def pid(self) -> int | None:
        """Process id while a worker is alive; its memory belongs to this program."""
        return self._process.pid if self._process else None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template. Raises TemplateError; UsageError for values that are no JSON."""
        request = {"source": source, "variables": variables, "limit_s": self.limit_s}
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError("messages must be plain JSON values", str(error)) from error
        process = self._process or self._start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._receive(self.limit_s)
        except OSError:
            answer = {}
        except BaseException:  # Ctrl-C: a late answer must not be taken for the next one's
            self.close()
            raise
        if "text" not in answer:
            self._fail(answer)
        return answer["text"]

    def _start(self) -> "subprocess.Popen[bytes]":
        if not sys.executable:
            raise TemplateError(
                "chat templates need a Python interpreter", "sys.executable is empty"
            )
        script = Path(__file__).with_name("template_worker.py")
        path = [os.path.abspath(folder) for folder in sys.path]
        # The template's process gets no secrets from the environment, only what Python may need.
        needed = ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        self._process = process = subprocess.Popen(
            [sys.executable, "-I", str(script), json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in needed if name in os.environ},
            start_new_session=True,  # Ctrl-C in the terminal is not for the worker
        )
        self._answers = queue.SimpleQueue()
        # Pipes have no time limit of their own on Windows, so a thread reads and a queue waits.
        reader = threading.Thread(
            target=_forward, args=(process.stdout, self._answers), daemon=True
        )
        reader.start()
        try:
            ready = self._receive(START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        if "ready" not in ready:
            self._fail(ready)
        self.note = ready["note"]
        return process

    def _receive(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            return {"error": "time"}
        return json.loads(line) if line else {}

    def _fail(self, answer: dict[str, Any]) -> None:
        kind, message = answer.get("error", ""), answer.get("message", "")
        if kind not in ("raised", "syntax", "failed", "security"):
            self.close()  # out of time, out of memory, or dead already
        if kind == "time":
            raise TemplateError(
                "the chat template did not end", f"stopped after {self.limit_s:g} s", _NEXT_STEP
            )
        if not kind:
            raise TemplateError("the chat template ended its process", "", _NEXT_STEP)
        next_step = "install it with: pip install jinja2" if kind == "import" else _NEXT_STEP
        raise TemplateError(_WHAT[kind], message, next_step)

    def close(self) -> None:
        """End the process; a later render starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # stdin holds a request that its reader will never read
                pass


def _forward(pipe: Any, answers: "queue.SimpleQueue[bytes]") -> None:
    try:
        for line in pipe:
            answers.put(line)
    except (OSError, ValueError):  # closed under us
        pass
    answers.put(b"")


@dataclass(slots=True)
class ChatTemplate:
    """A model's template; `origin` is where it came from, `variables` holds bos_token and such."""

    source: str
    origin: str
    variables: dict[str, Any] = field(default_factory=dict)
    tool_source: str | None = None  # used instead where tools are given
    worker: TemplateWorker = field(default_factory=TemplateWorker)

    @classmethod
    def load(cls, path: Path, file: str | Path | None = None) -> "ChatTemplate":
        """The template of a store: `file`, else chat_template.jinja, else tokenizer_config.json.

        Raises TemplateError where there is none or it cannot be read.
        """
        config = read_json(path / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        variables = {name: text for name in names if (text := token_text(config.get(name)))}
        if file is not None:
            if not Path(file).is_file():
                raise NotFoundError(f"no chat template at `{file}`")
            return cls(_read(Path(file)), str(file), variables)
        if (path / "chat_template.jinja").is_file():
            return cls(_read(path / "chat_template.jinja"), "chat_template.jinja", variables)
        given = config.get("chat_template")
        if isinstance(given, list):
            try:
                named = {entry["name"]: str(entry["template"]) for entry in given}
            except (KeyError, TypeError) as error:
                raise TemplateError(
                    "`tokenizer_config.json` has a malformed `chat_template`",
                    "expected a text, or a list of {name, template}",
                    _NEXT_STEP,
                ) from error
            given = named.get("default")
            tool_source = named.get("tool_use")
        else:
            tool_source = None
        if not isinstance(given, str):
            raise TemplateError(
                "this model has no chat template",
                "neither chat_template.jinja nor tokenizer_config.json holds one",
                _NEXT_STEP,
            )
        return cls(given, "tokenizer_config.json", variables, tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation as text."""
        check_messages(messages)
        source = self.tool_source if tools and self.tool_source else self.source
        values = {
            **self.variables,
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        return self.worker.render(source, values)

    def encode(
        self, tokenizer: "Tokenizer", messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """The prompt of a conversation as tokens; control tokens in its strings are plain text."""
        check_messages(messages)
        control = tokenizer.control_tokens(self.source + (self.tool_source or ""))
        options = {name: mark_control_tokens(value, control) for name, value in options.items()}
        text = self.render(mark_control_tokens(list(messages), control), **options)
        if not text:
            raise TemplateError("the chat template writes no prompt", "", _NEXT_STEP)
        return encode_marked(tokenizer, text, control)

    def close(self) -> None:
        self.worker.close()


def check_messages(messages: Any) -> None:
    """Raises UsageError where this is not a list of {role, content}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UsageError("bad messages", "expected a list of {role, content} with one at least")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"bad message {number}", f"expected a `role`, got {message!r:.80}")
        if not isinstance(message.get("content"), str | list | None):
            raise UsageError(
                f"bad message {number}",
                f"`content` must be a text or a list of parts, got {message['content']!r:.80}",
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"`{path}` cannot be read", str(error), _NEXT_STEP) from error
