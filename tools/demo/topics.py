"""Question and answer entries built from the tables: every fact with many ways to ask for it."""

from __future__ import annotations

import dataclasses

import facts


@dataclasses.dataclass(frozen=True)
class Entry:
    """One fact: its topic, ways to ask, the one answer, and short ways to ask it as a follow-up."""

    topic: str
    questions: tuple[str, ...]
    answer: str
    follow: tuple[str, ...] = ()


def a_or_an(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def upper_first(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def arithmetic() -> list[Entry]:
    """Sums and differences of 0 to 20, products up to 12 times 12, doubles and halves."""
    out = []
    for a in range(21):
        for b in range(21):
            out.append(_sum(a, b, "plus", "+", a + b))
            if a >= b:
                out.append(_sum(a, b, "minus", "-", a - b))
            if a <= 12 and b <= 12:
                out.append(_sum(a, b, "times", "*", a * b))
        for b in range(21):
            if a < b:
                asks = (f"Which is larger, {a} or {b}?", f"Which number is bigger, {b} or {a}?")
                out.append(Entry("compare", asks, f"{b} is larger than {a}."))
        asks = (f"What is double {a}?", f"Double {a}.", f"What is twice {a}?")
        out.append(Entry("double", asks, f"Twice {a} is {2 * a}.", (f"And twice {a}?",)))
        asks = (f"What is half of {2 * a}?", f"Halve {2 * a}.")
        out.append(Entry("half", asks, f"Half of {2 * a} is {a}.", (f"And half of {2 * a}?",)))
        asks = (f"What number comes after {a}?", f"Which number follows {a}?")
        out.append(Entry("count", asks, f"{a + 1} comes after {a}.", (f"And after {a}?",)))
        word = facts.NUMBER_WORDS[a]
        asks = (f"How do you write {a} in words?", f"Write {a} as a word.")
        out.append(Entry("words", asks, f"{a} in words is {word}.", (f"And {a}?",)))
    return out


def _sum(a: int, b: int, word: str, sign: str, result: int) -> Entry:
    asks = [
        f"What is {a} {word} {b}?",
        f"What is {a} {sign} {b}?",
        f"How much is {a} {word} {b}?",
        f"{a} {sign} {b}",
        f"{a}{sign}{b}",
        f"What is {a}{sign}{b}?",
        f"{a} {sign} {b} = ?",
        f"{a} {word} {b}?",
        f"Calculate {a} {sign} {b}.",
        f"Compute {a} {word} {b}.",
        f"What do you get for {a} {word} {b}?",
    ]
    asks += {
        "plus": [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?"],
        "minus": [f"Subtract {b} from {a}.", f"Take {b} away from {a}."],
        "times": [f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?"],
    }[word]
    follow = (f"And {a} {word} {b}?", f"And {a} {sign} {b}?", f"What about {a} {word} {b}?")
    return Entry(word, tuple(asks), f"{a} {word} {b} is {result}.", follow)


def world() -> list[Entry]:
    """Capitals, continents and languages."""
    out = []
    for land, city in facts.CAPITALS.items():
        asks = (
            f"What is the capital of {land}?",
            f"Which city is the capital of {land}?",
            f"What is {land}'s capital?",
            f"Name the capital of {land}.",
            f"What's the capital city of {land}?",
            f"Do you know the capital of {land}?",
            f"Capital of {land}?",
        )
        follow = (f"And of {land}?", f"What about {land}?", f"And the capital of {land}?")
        out.append(Entry("capital", asks, f"The capital of {land} is {city}.", follow))
        asks = (
            f"{city} is the capital of which country?",
            f"Of which country is {city} the capital?",
            f"Which country has {city} as its capital?",
        )
        follow = (f"And {city}?", f"What about {city}?")
        out.append(Entry("capital_of", asks, f"{city} is the capital of {land}.", follow))
    for continent, lands in facts.CONTINENTS.items():
        for land in lands.split():
            asks = (
                f"On which continent is {land}?",
                f"Where is {land}?",
                f"Which continent is {land} in?",
                f"In what part of the world is {land}?",
            )
            follow = (f"And {land}?", f"What about {land}?")
            out.append(Entry("continent", asks, f"{land} is in {continent}.", follow))
    for land, tongue in facts.LANGUAGES.items():
        asks = (
            f"What language do people speak in {land}?",
            f"Which language is spoken in {land}?",
            f"What do they speak in {land}?",
        )
        follow = (f"And in {land}?", f"What about {land}?")
        out.append(Entry("language", asks, f"People in {land} speak {tongue}.", follow))
    return out


def animals() -> list[Entry]:
    """Sounds, young, legs, homes and kinds of things."""
    out = []
    for name, sound in facts.SOUNDS.items():
        who = a_or_an(name)
        asks = (
            f"What sound does {who} make?",
            f"What does {who} do?",
            f"What noise does {who} make?",
        )
        out.append(Entry("sound", asks, f"{upper_first(who)} {sound}.", (f"And {who}?",)))
    for name, young in facts.YOUNG.items():
        who = a_or_an(name)
        asks = (
            f"What is a young {name} called?",
            f"What is a baby {name} called?",
            f"What do you call the young of {who}?",
        )
        follow = (f"And a young {name}?", f"And a baby {name}?")
        out.append(Entry("young", asks, f"A young {name} is called {a_or_an(young)}.", follow))
    for name, legs in facts.LEGS.items():
        who = a_or_an(name)
        asks = (f"How many legs does {who} have?", f"What number of legs does {who} have?")
        count = f"{legs} legs" if legs else "no legs"
        out.append(Entry("legs", asks, f"{upper_first(who)} has {count}.", (f"And {who}?",)))
    for name, home in facts.HOMES.items():
        who = a_or_an(name)
        asks = (f"Where does {who} live?", f"What is the home of {who}?")
        out.append(Entry("home", asks, f"{upper_first(who)} lives in {home}.", (f"And {who}?",)))
    for kind, names in facts.KINDS.items():
        for name in names.split():
            who = name if name[0].isupper() else a_or_an(name)
            asks = (
                f"What is {who}?",
                f"What kind of thing is {who}?",
                f"Tell me what {who} is.",
            )
            yes = f"{upper_first(who)} is {a_or_an(kind)}."
            out.append(Entry("kind", asks, yes, (f"And {who}?", f"What about {who}?")))
    return out


def words() -> list[Entry]:
    """Colours, opposites, plurals, past tenses and jobs."""
    out = []
    for thing, colour in facts.COLOURS.items():
        asks = (
            f"What colour is {thing}?",
            f"Which colour does {thing} have?",
            f"What color is {thing}?",
            f"Tell me the colour of {thing}.",
        )
        out.append(Entry("colour", asks, f"{upper_first(thing)} is {colour}.", (f"And {thing}?",)))
    for (one, two), mix in facts.MIXES.items():
        for a, b in ((one, two), (two, one)):
            asks = (
                f"What do you get when you mix {a} and {b}?",
                f"Which colour do {a} and {b} make?",
                f"Mix {a} and {b}.",
            )
            out.append(
                Entry("mix", asks, f"{upper_first(a)} and {b} make {mix}.", (f"And {a} and {b}?",))
            )
    for one, two in facts.OPPOSITES.items():
        for a, b in ((one, two), (two, one)):
            if (b, a) == ("light", "heavy") or (a == "light" and b == "heavy"):
                continue
            asks = (
                f"What is the opposite of {a}?",
                f"Give me the opposite of {a}.",
                f"Which word means the opposite of {a}?",
                f"Opposite of {a}?",
                f"What is the antonym of {a}?",
            )
            follow = (f"And of {a}?", f"What about {a}?")
            out.append(Entry("opposite", asks, f"The opposite of {a} is {b}.", follow))
    for one, many in facts.PLURALS.items():
        asks = (f"What is the plural of {one}?", f"What is the plural form of {one}?")
        out.append(Entry("plural", asks, f"The plural of {one} is {many}.", (f"And of {one}?",)))
    for now, then in facts.PAST.items():
        asks = (f"What is the past tense of {now}?", f"Give me the past tense of {now}.")
        out.append(Entry("past", asks, f"The past tense of {now} is {then}.", (f"And of {now}?",)))
    for task, who in facts.JOBS.items():
        asks = (f"Who {task}?", f"What do you call a person who {task}?")
        out.append(Entry("job", asks, f"{upper_first(who)} {task}."))
    return out


def measures() -> list[Entry]:
    """Days, months, units, shapes and the single questions."""
    out = []
    for i, day in enumerate(facts.DAYS):
        after, before = facts.DAYS[(i + 1) % 7], facts.DAYS[i - 1]
        asks = (
            f"What day comes after {day}?",
            f"Which day is after {day}?",
            f"What is the day after {day}?",
            f"If today is {day}, what day is tomorrow?",
        )
        out.append(Entry("day", asks, f"{after} comes after {day}.", (f"And after {day}?",)))
        asks = (
            f"What day comes before {day}?",
            f"Which day is before {day}?",
            f"If today is {day}, what day was yesterday?",
        )
        out.append(Entry("day", asks, f"{before} comes before {day}.", (f"And before {day}?",)))
    for i, month in enumerate(facts.MONTHS):
        after, before, nth = facts.MONTHS[(i + 1) % 12], facts.MONTHS[i - 1], facts.ORDINALS[i]
        asks = (f"What month comes after {month}?", f"Which month is after {month}?")
        out.append(Entry("month", asks, f"{after} comes after {month}.", (f"And after {month}?",)))
        asks = (f"What month comes before {month}?", f"Which month is before {month}?")
        out.append(
            Entry("month", asks, f"{before} comes before {month}.", (f"And before {month}?",))
        )
        asks = (f"What is the {nth} month of the year?", f"Which month is the {nth}?")
        out.append(Entry("month", asks, f"{month} is the {nth} month.", (f"And the {nth}?",)))
        asks = (f"How many days does {month} have?", f"How many days are in {month}?")
        days = f"{month} has {facts.MONTH_DAYS[month]} days."
        out.append(Entry("month_days", asks, days, (f"And {month}?", f"And in {month}?")))
    for whole, part, count in facts.UNITS:
        asks = (
            f"How many {part} are in {whole}?",
            f"How many {part} does {whole} have?",
            f"{upper_first(whole)} is how many {part}?",
        )
        follow = (f"And how many {part} are in {whole}?",)
        out.append(Entry("unit", asks, f"There are {count} {part} in {whole}.", follow))
    for shape, sides in facts.SIDES.items():
        asks = (
            f"How many sides does {a_or_an(shape)} have?",
            f"How many sides are in {a_or_an(shape)}?",
        )
        answer = f"{upper_first(a_or_an(shape))} has {sides} sides."
        out.append(Entry("sides", asks, answer, (f"And {a_or_an(shape)}?",)))
    for question, answer in facts.SINGLE.items():
        out.append(Entry("single", (question,), answer))
    return out


def everyday() -> list[Entry]:
    """All facts but arithmetic."""
    return world() + animals() + words() + measures()
