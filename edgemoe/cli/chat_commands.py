"""The slash commands of `edgemoe chat`."""

import sys

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from ..runtime.sets import set_names
from .conversation import Conversation
from .options import SAMPLING
from .render import note, one_line
from .routing_options import routing_of

HELP = '''  /help              this list
  /bye               leave (also Ctrl-D)
  /clear             start a new conversation
  /system [TEXT]     show or set the system message; `/system off` removes it
  /set [NAME VALUE]  show or change sampling, such as /set temperature 0.7
  /set set [NAME]    show or change the pruned set: /set set code hard
  /set routing [...] show or change the routes: /set routing drop-cold 0.1
  /set WHICH off     without a set, or with the model's own routes
  /stats             memory, expert cache and speed so far
  /regen             answer the last question again
  """                begins and ends a text of several lines
  Ctrl-C             stops the answer; a second one leaves'''


class Leave(Exception):
    """The user wants to go."""


def handle(conversation: Conversation, line: str) -> bool:
    """Carry out one slash command; returns whether an answer is due."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name not in _COMMANDS:
        raise UsageError(f"unknown command `{one_line(name)}`", "", "/help lists the commands")
    return bool(_COMMANDS[name](conversation, rest))


def _help(conversation: Conversation, rest: str) -> None:
    note(HELP)


def _bye(conversation: Conversation, rest: str) -> None:
    raise Leave


def _clear(conversation: Conversation, rest: str) -> None:
    conversation.clear()
    note("new conversation")


def _system(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.system = None if rest == "off" else rest
    note(f"system message: {conversation.system or 'none'}")


def _set(conversation: Conversation, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if name == "set":
        return _expert_set(conversation, value.split())
    if name == "routing":
        return _routing(conversation, value.split())
    if name:
        conversation.set(name, value.strip())
    names = [name.replace("-", "_")] if name else [*SAMPLING, "stop"]
    for each in names:
        note(f"{each} = {getattr(conversation.params, each)}")


def _expert_set(conversation: Conversation, words: list[str]) -> None:
    """`NAME [MODE [THRESHOLD]]`, or `off`."""
    engine = conversation.engine
    if words:
        threshold = None
        try:
            threshold = float(words[2]) if len(words) > 2 else None
        except ValueError:
            raise UsageError(f"`{words[2]}` is no threshold", "expected a number") from None
        engine.use_set(None if words == ["off"] else words[0], *words[1:2], threshold=threshold)
    names = ", ".join(set_names(engine.path)) or "none"
    note(f"{engine.active_set.label if engine.active_set else 'no set'} (there are: {names})")


def _routing(conversation: Conversation, words: list[str]) -> None:
    """`OPTION VALUE ...`, as on the command line without its dashes, or `off`."""
    engine = conversation.engine
    if words:
        engine.use_routing(None if words == ["off"] else routing_of(words))
    change = engine.routing
    is_plain = change is None or change.routing.is_plain
    note("the model's own routes" if is_plain else change.routing.label)


def _stats(conversation: Conversation, rest: str) -> None:
    totals = conversation.totals
    lookups = totals["hits"] + totals["misses"]
    rate = f", hit {100 * totals['hits'] / lookups:.0f} %" if lookups else ""
    note("\n".join(conversation.engine.plan.table()))
    note(f"in use now: {format_bytes(conversation.engine.memory_bytes())}")
    if lent := conversation.engine.lent_memory:
        note(f"of what is planned for later, {format_bytes(lent.lent_bytes)} hold experts")
    answers = "1 answer" if totals["turns"] == 1 else f"{totals['turns']} answers"
    note(
        f"so far: {answers}, {totals['tokens']} tokens{rate}, "
        f"{format_bytes(totals['bytes_read'])} of experts read"
    )
    if conversation.stats is not None:
        stats = conversation.stats
        note(
            f"last answer: {stats.prompt_tokens} prompt tokens ({stats.cached_tokens} kept), "
            f"{stats.generated_tokens} new\n"
            f"  prefill {stats.prefill_s:.2f} s, decode {stats.decode_s:.2f} s, "
            f"stalled {stats.stall_s:.2f} s"
        )


def _regen(conversation: Conversation, rest: str) -> bool:
    conversation.take_back_answer()
    if conversation.params.temperature == 0 and sys.stdin.isatty():
        note("(temperature is 0, so the answer will be the same; try /set temperature 0.7)")
    return True


_COMMANDS = {
    "/help": _help,
    "/?": _help,
    "/bye": _bye,
    "/exit": _bye,
    "/quit": _bye,
    "/clear": _clear,
    "/system": _system,
    "/set": _set,
    "/stats": _stats,
    "/regen": _regen,
}
