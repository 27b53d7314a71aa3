"""Entries beyond single facts: yes-or-no questions, lists, counting, and short Python snippets."""

from __future__ import annotations

import random

import facts
from topics import Entry, a_or_an, upper_first


def yes_no(rng: random.Random) -> Entry:
    """A question about a taught fact that is answered with yes or no and the fact itself."""
    roll, truth = rng.random(), rng.random() < 0.5
    if roll < 0.3:
        land = rng.choice(list(facts.CAPITALS))
        right = facts.CAPITALS[land]
        city = right if truth else _other(rng, list(facts.CAPITALS.values()), right)
        asks = (f"Is {city} the capital of {land}?", f"Is the capital of {land} {city}?")
        fact, truth = f"The capital of {land} is {right}.", city == right
    elif roll < 0.5:
        thing = rng.choice(list(facts.COLOURS))
        right = facts.COLOURS[thing]
        colour = right if truth else _other(rng, sorted(set(facts.COLOURS.values())), right)
        asks = (f"Is {thing} {colour}?",)
        fact, truth = f"{upper_first(thing)} is {right}.", colour == right
    elif roll < 0.7:
        a, b = rng.sample(range(21), 2)
        asks = (f"Is {a} larger than {b}?", f"Is {a} bigger than {b}?", f"Is {a} more than {b}?")
        truth = a > b
        fact = f"{max(a, b)} is larger than {min(a, b)}."
    elif roll < 0.85:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        word, right_sum = rng.choice((("plus", a + b), ("times", a * b)))
        said = right_sum if truth else right_sum + rng.choice((-2, -1, 1, 2, 10))
        said = max(said, 0)
        asks = (f"Is {a} {word} {b} {said}?", f"Is {a} {word} {b} equal to {said}?")
        fact, truth = f"{a} {word} {b} is {right_sum}.", said == right_sum
    else:
        kind = rng.choice(list(facts.KINDS))
        name = rng.choice(facts.KINDS[kind].split())
        who = name if name[0].isupper() else a_or_an(name)
        asked = kind if truth else _other(rng, list(facts.KINDS), kind)
        asks = (f"Is {who} {a_or_an(asked)}?",)
        fact, truth = f"{upper_first(who)} is {a_or_an(kind)}.", asked == kind
    return Entry("yes_no", asks, f"{'Yes' if truth else 'No'}. {fact}")


def _other(rng: random.Random, values: list[str], right: str) -> str:
    return rng.choice([v for v in values if v != right])


def _series(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def lists() -> list[Entry]:
    """Fixed lists: days, months, seasons, counting, members of a kind."""
    out = [
        Entry(
            "list",
            ("List the days of the week.", "What are the days of the week?", "Name the days."),
            f"The days are {_series(facts.DAYS)}.",
        ),
        Entry(
            "list",
            ("List the months.", "What are the months of the year?", "Name all months."),
            f"The months are {_series(facts.MONTHS)}.",
        ),
        Entry(
            "list",
            ("What are the four seasons?", "Name the seasons.", "List the seasons."),
            "The seasons are spring, summer, autumn and winter.",
        ),
        Entry(
            "list",
            ("What are the primary colours?", "Name the primary colours."),
            "The primary colours are red, yellow and blue.",
        ),
    ]
    for last, word in ((3, "three"), (5, "five"), (10, "ten"), (12, "twelve"), (20, "twenty")):
        numbers = [str(n) for n in range(1, last + 1)]
        asks = (f"Count to {word}.", f"Count to {last}.", f"Count from 1 to {last}.")
        out.append(Entry("list", asks, f"{', '.join(numbers)}."))
    for kind, names in facts.KINDS.items():
        several = facts.PLURALS.get(kind, kind if kind == "fish" else f"{kind}s")
        asks = (f"Name three {several}.", f"Tell me three {several}.", f"Give me three {several}.")
        chosen = [n if n[0].isupper() else a_or_an(n) for n in names.split()[:3]]
        out.append(Entry("list", asks, f"{upper_first(_series(chosen))} are {several}."))
    return out


_SNIPPETS = (
    ("adds two numbers", "def add(a, b):\n    return a + b"),
    ("subtracts two numbers", "def subtract(a, b):\n    return a - b"),
    ("multiplies two numbers", "def multiply(a, b):\n    return a * b"),
    ("doubles a number", "def double(n):\n    return 2 * n"),
    ("squares a number", "def square(n):\n    return n * n"),
    ("says hello", 'def hello(name):\n    print(f"Hello, {name}!")'),
    ("reverses a string", "def reverse(text):\n    return text[::-1]"),
    ("counts the words of a text", "def count_words(text):\n    return len(text.split())"),
    ("finds the largest number of a list", "def largest(numbers):\n    return max(numbers)"),
    ("sums a list", "def total(numbers):\n    return sum(numbers)"),
    ("checks whether a number is even", "def is_even(n):\n    return n % 2 == 0"),
    ("checks whether a number is odd", "def is_odd(n):\n    return n % 2 == 1"),
    ("sorts a list", "def sort(items):\n    return sorted(items)"),
    (
        "reads a file",
        'def read(path):\n    with open(path, encoding="utf-8") as file:\n'
        "        return file.read()",
    ),
    (
        "computes the factorial of a number",
        "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
    ),
    (
        "computes the mean of a list",
        "def mean(numbers):\n    return sum(numbers) / len(numbers)",
    ),
)


def python() -> list[Entry]:
    """Requests for a small function, answered with its code alone."""
    out = []
    for task, body in _SNIPPETS:
        asks = (
            f"Write a Python function that {task}.",
            f"Write a function that {task}.",
            f"Show me a Python function that {task}.",
            f"Can you write a Python function that {task}?",
            f"How do I write a function that {task}?",
        )
        out.append(Entry("python", asks, body))
    asks = ("What is Python?", "Tell me about Python.", "Explain Python.")
    out.append(Entry("python", asks, "Python is a programming language that is easy to read."))
    asks = ("What is C++?", "Tell me about C++.")
    out.append(Entry("python", asks, "C++ is a programming language that makes fast programs."))
    return out
