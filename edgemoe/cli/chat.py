"""`edgemoe chat [MODEL]`: a conversation; the prefix stays in the KV cache between turns."""

import argparse
import sys

from ..runtime.errors import ContextError, EdgeMoeError
from . import options
from .chat_commands import Leave, handle
from .chat_input import read_turn
from .conversation import Conversation
from .render import dim, model_name, note, open_output, print_notes, report_error, write_answer

EPILOG = """Inside: /help lists the commands. The first Ctrl-C stops an answer, the second leaves.
Standard input may be a pipe: one turn a line, answers on standard output.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_sampling_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    open_output()
    from ..engine import Engine
    from ..sampling import SamplingParams

    given = options.sampling_arguments(args)
    SamplingParams(**given)  # a wrong value is refused before the model is loaded
    if sys.stderr.isatty():
        note(dim("loading ...", sys.stderr))
    with Engine.from_pretrained(path, **options.engine_arguments(args)) as engine:
        print_notes(engine, args.verbose)
        if sys.stdin.isatty():
            note(dim(f"{model_name(engine)} · /help for help, /bye or Ctrl-D to leave", sys.stderr))
        params = SamplingParams.from_config(engine.generation_config, **given)
        return talk(Conversation(engine, params, args.system))


def talk(conversation: Conversation) -> int:
    """The loop: read a turn, answer it, until /bye, the end of input, or a second Ctrl-C."""
    code = 0
    interrupted = False
    while True:
        try:
            line = read_turn()
        except KeyboardInterrupt:
            if interrupted:
                note("")
                return 130
            interrupted = True
            note("\n(Ctrl-C again leaves)")
            continue
        if line is None:
            return code
        if not line.strip():
            continue
        interrupted = False
        try:
            if line.startswith("/"):
                if not handle(conversation, line):
                    continue
            else:
                conversation.ask(line)
            interrupted = answer(conversation)
        except Leave:
            return code
        except EdgeMoeError as error:
            if isinstance(error, ContextError):
                error.next_step = "/clear starts a new conversation"
            failed = report_error(error, "/help lists the commands")
            code = code or (0 if sys.stdin.isatty() else failed)


def answer(conversation: Conversation) -> bool:
    """Print the answer to the last turn; returns whether Ctrl-C stopped it."""
    text, stopped = "", False
    events = conversation.stream()
    try:
        for event in events:
            text = event.text or text
            write_answer(event.text)
    except KeyboardInterrupt:  # the engine raises it between two layers, and stays whole
        stopped = True
    finally:
        events.close()
    if text and not text.endswith("\n"):
        write_answer("\n")
    if stopped:
        note(dim("(stopped; Ctrl-C again leaves)", sys.stderr))
    elif conversation.finish_reason == "length":
        note(dim(f"(cut {conversation.limit()})", sys.stderr))
    if conversation.stats is not None and conversation.stats.generated_tokens:
        note(dim(conversation.stats.footer(), sys.stderr))
    return stopped
