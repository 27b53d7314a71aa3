"""The process that renders chat templates; started by chat_template.py as a plain script.

A template comes with a model, so it is a stranger's program. It runs here, in jinja2's sandbox, in
a process of its own that holds no model, gets no environment and can be killed. Imports neither
torch nor numpy nor anything of edgemoe. Protocol: one JSON object per line on stdin, one per
request on stdout: {"text": ...} or {"error": kind, "message": ...}.
"""

import json
import sys

MAX_OUTPUT_BYTES = 8 << 20
# Address space on top of what interpreter and jinja2 take (about 25 MiB): room to hold the largest
# output as parts, as one text and as one line. A template that fills it stays near the memory that
# the plan has for this process and its headroom.
WORK_BYTES = 40 << 20


def _limit_memory() -> str:
    """Cap the address space where the system can; says what could not be limited."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now_bytes = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + WORK_BYTES,) * 2)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        return f"no address-space limit for chat templates here ({error})"
    return ""


def _alarm(seconds: int) -> None:
    # The parent enforces the limit; this ends a loop whose parent was killed.
    import signal

    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


class _Raised(Exception):
    """What a template says with raise_exception."""


def _environment():
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, modifies_known_mutable

    class Generation(Extension):
        """{% generation %} marks the answer for training; for rendering it is transparent."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise _Raised(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes <, > and & for HTML, which would change the prompt
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    class Sandbox(ImmutableSandboxedEnvironment):
        def is_safe_attribute(self, value, attribute, found):
            # jinja2 renders an unsafe attribute as undefined, which `{{ x.__class__ }}` prints as
            # nothing; a template that tries deserves an error, not a prompt with a hole
            safe = super().is_safe_attribute(value, attribute, found)
            if not safe and not modifies_known_mutable(value, attribute):
                raise SecurityError(f"access to attribute `{attribute}` is unsafe")
            return safe

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


class _Renderer:
    def __init__(self) -> None:
        self.environment = _environment()
        self.source: str | None = None
        self.template = None

    def render(self, source: str, variables: dict) -> str:
        if source != self.source:
            self.template, self.source = self.environment.from_string(source), source
        parts: list[str] = []
        num_bytes = 0
        for part in self.template.generate(**variables):
            num_bytes += len(part.encode("utf-8", "replace"))
            if num_bytes > MAX_OUTPUT_BYTES:
                raise MemoryError(f"more than {MAX_OUTPUT_BYTES >> 20} MiB of output")
            parts.append(part)
        return "".join(parts)

    def answer(self, request: dict) -> dict:
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        try:
            return {"text": self.render(request["source"], request["variables"])}
        except _Raised as error:
            return {"error": "raised", "message": str(error)}
        except SecurityError as error:
            return {"error": "security", "message": str(error)}
        except TemplateSyntaxError as error:
            return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
        except (MemoryError, OverflowError) as error:
            return {"error": "memory", "message": str(error) or "out of memory"}
        except RecursionError:
            return {"error": "failed", "message": "it recurses too deeply"}
        except Exception as error:  # whatever a template can provoke is the template's fault
            return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but answers may reach the pipe

    def send(answer: dict) -> None:
        # Lone surrogates, legal in Python's text and in JSON, would not reach a tokenizer
        answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        answers.flush()

    try:
        renderer = _Renderer()
    except ImportError as error:
        send({"error": "import", "message": str(error)})
        return
    send({"ready": True, "note": _limit_memory()})
    for line in requests:
        request = json.loads(line)
        _alarm(int(request["limit_s"]) + 3)
        answer = renderer.answer(request)
        _alarm(0)
        send(answer)


if __name__ == "__main__":
    # The parent's import path comes as an argument: the script's own folder, which Python puts
    # first, holds modules of edgemoe whose names could hide others.
    sys.path[:] = json.loads(sys.argv[1])
    main()
