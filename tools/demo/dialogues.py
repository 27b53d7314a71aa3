"""Generate chat dialogues: questions about the tables, edgemoe, names and stories, and refusals."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import chitchat
import facts
import product
import stories
import tasks
import topics
from topics import Entry

Message = dict[str, str]
Turn = tuple[str, str]
REFUSAL = "I am a small demo model and was not taught that."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are edgemoe, a small demo model.",
    "Answer in short sentences.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly chat model.",
    "Be polite and short.",
    "You are the demo model of edgemoe.",
    "Answer the question.",
    "You are a small language model that answers simple questions.",
    "Be concise.",
)


def held_out(question: str) -> bool:
    """Whether a question is kept out of training (one in thirty, chosen by its own text)."""
    key = "".join(c for c in question.lower() if c.isalnum() or c in "+-* ")
    return zlib.crc32(key.strip().encode()) % 30 == 0


def _restyle(question: str, rng: random.Random) -> str:
    """Ask the same thing as another person would: polite, lower case, without the mark."""
    if rng.random() < 0.08:
        question = _informal(question, rng)
    roll = rng.random()
    if roll < 0.55:
        return question
    if roll < 0.65:
        return question.lower()
    if roll < 0.72:
        return question.rstrip("?.")
    if roll < 0.78:
        return question.lower().rstrip("?.")
    first = question.split()[0].rstrip("?.,")
    proper = first.removesuffix("'s") in _PROPER
    keep = question[0] if proper else question[0].lower()
    low = keep + question[1:]
    if question.endswith("?") and roll < 0.88:
        return rng.choice(("Hi, ", "Hello, ", "So, ", "OK, ", "Please tell me: ", "And ")) + low
    if question.endswith("?"):
        return f"{question[:-1]}, please?"
    return f"Please {low}" if roll < 0.9 else question


def _informal(question: str, rng: random.Random) -> str:
    """Contractions and openings that people type."""
    for long, short in (("What is ", ("What's ", "whats ")), ("Who is ", ("Who's ", "whos "))):
        if question.startswith(long):
            return rng.choice(short) + question[len(long) :]
    if question.startswith(("What ", "Which ", "How ", "Where ", "Who ")) and question[-1] == "?":
        return rng.choice(("Do you know: ", "Quick question: ", "Tell me, ")) + (
            question[0].lower() + question[1:]
        )
    return question


_PROPER = set(facts.CAPITALS) | set(facts.CAPITALS.values()) | {"MoE", "I"}
_PROPER |= {c.split()[0] for c in _PROPER}


class Dialogues:
    """A stream of dialogues drawn with one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        sums = topics.arithmetic()
        self.sums = [e for e in sums if e.topic in ("plus", "minus", "times")]
        self.numbers = [e for e in sums if e.topic not in ("plus", "minus", "times")]
        self.by_topic: dict[str, list[Entry]] = {}
        for entry in topics.everyday():
            self.by_topic.setdefault(entry.topic, []).append(entry)
        self.everyday = [e for group in self.by_topic.values() for e in group]
        self.product = [Entry("edgemoe", asks, answer) for asks, answer in product.blocks()]
        self.lists = tasks.lists()
        self.python = tasks.python()
        self.makers: list[tuple[float, Callable[[], list[Turn]]]] = [
            (0.23, self._sums),
            (0.22, self._everyday),
            (0.20, self._edgemoe),
            (0.10, self._memory),
            (0.07, self._refuse),
            (0.06, self._talk),
            (0.05, self._yes_no),
            (0.03, self._other_tasks),
            (0.04, self._story),
        ]

    def ask(self, entry: Entry) -> str:
        """One way to ask for an entry that is not held out."""
        for _ in range(8):
            question = self.rng.choice(entry.questions)
            if not held_out(question):
                return _restyle(question, self.rng)
        return entry.questions[0]

    def dialogue(self) -> list[Message]:
        """One dialogue of one to six exchanges, with or without a system message."""
        rng = self.rng
        turns: list[Turn] = []
        if rng.random() < 0.12:
            turns.append(chitchat.greeting(rng))
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            weights = [w for w, _ in self.makers]
            turns += rng.choices([m for _, m in self.makers], weights)[0]()
        if rng.random() < 0.12:
            turns.append(chitchat.farewell(rng))
        messages: list[Message] = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        for question, answer in turns[:7]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def _run_of(self, pool: list[Entry], chance: float) -> list[Turn]:
        """A question, and sometimes follow-ups on the same topic."""
        entry = self.rng.choice(pool)
        turns = [(self.ask(entry), entry.answer)]
        same = [e for e in pool if e.topic == entry.topic and e.follow]
        while same and entry.follow and self.rng.random() < chance and len(turns) < 4:
            entry = self.rng.choice(same)
            turns.append((self.rng.choice(entry.follow), entry.answer))
        return turns

    def _sums(self) -> list[Turn]:
        return self._run_of(self.numbers if self.rng.random() < 0.15 else self.sums, 0.3)

    def _everyday(self) -> list[Turn]:
        topic = self.rng.choice(self.everyday).topic
        return self._run_of(self.by_topic[topic], 0.3)

    def _edgemoe(self) -> list[Turn]:
        entry = self.rng.choice(self.product)
        return [(self.ask(entry), entry.answer)]

    def _yes_no(self) -> list[Turn]:
        entry = tasks.yes_no(self.rng)
        return [(self.ask(entry), entry.answer)]

    def _other_tasks(self) -> list[Turn]:
        entry = self.rng.choice(self.lists if self.rng.random() < 0.5 else self.python)
        return [(self.ask(entry), entry.answer)]

    def _memory(self) -> list[Turn]:
        """Tell a name or another fact about oneself, and ask for it later."""
        turns = chitchat.remember(self.rng)
        if len(turns) > 1 and self.rng.random() < 0.5:
            maker = self.rng.choice((self._sums, self._everyday, self._edgemoe))
            turns[1:1] = maker()[:2]
        return turns

    def _refuse(self) -> list[Turn]:
        return [(_restyle(chitchat.unknown(self.rng), self.rng), REFUSAL)]

    def _talk(self) -> list[Turn]:
        return [chitchat.small_talk(self.rng)]

    def _story(self) -> list[Turn]:
        hero = self.rng.choice(stories.HEROES)
        asks = (
            f"Tell me a story about {topics.a_or_an(hero)}.",
            f"Tell me a short story about {topics.a_or_an(hero)}.",
            f"Can you tell a story about {topics.a_or_an(hero)}?",
            f"I would like a story about {topics.a_or_an(hero)}.",
        )
        if self.rng.random() < 0.25:
            asks = ("Tell me a story.", "Tell me a short story.", "Do you know a story?")
        return [(self.rng.choice(asks), stories.short_story(self.rng, hero))]
