"""Small talk, things to remember within a conversation, and questions to refuse politely."""

from __future__ import annotations

import random

import facts
import stories
from facts import DAYS

Turn = tuple[str, str]

_HELLO = "Hello! How can I help you?"
_GREETINGS = (
    "Hello|Hi|Hello!|Hi!|Hey|Hey!|Good morning|Good evening|Good day|Hi there|Hello there!|hello|"
    "hi|"
    "Good afternoon|Greetings|Hello, demo model|Hi, edgemoe!|hey there"
).split("|")
_BYES = "Goodbye|Bye|Bye!|See you|See you later|Good night|bye|I have to go now|That is all".split(
    "|"
)
_TALK = {
    "I am well, thank you. How can I help you?": (
        "How are you?|How are you doing?|How do you do?|Are you well?|Hi, how are you?|"
        "How is it going?|how are you|How are you today?"
    ),
    "You are welcome.": (
        "Thank you|Thanks|Thank you!|Thanks a lot|Thank you very much|thanks|That was helpful|"
        "Great, thanks"
    ),
    "I am glad to hear that.": (
        "Great!|That is good|Well done|Good answer|Very good|Nice|I like that"
    ),
    "I am sorry. I am only a small demo model.": (
        "That is wrong|You are wrong|That is not right|Bad answer|This is not correct|"
        "I do not agree"
    ),
    "Please ask me a question.": (
        "OK|Okay|ok|Yes|No|Hm|Test|test|Well|Good|Ready?|I have a question"
    ),
    "Why did the expert go to the party? The router picked him.": (
        "Tell me a joke|Do you know a joke?|Make me laugh|Say something funny|tell me a joke"
    ),
    "I do not have feelings, but I am happy to help.": (
        "Are you happy?|Are you sad?|Do you have feelings?|Do you like me?|Are you tired?"
    ),
    "I only speak English.": (
        "Do you speak French?|Do you speak German?|Which languages do you speak?|"
        "Can you speak Spanish?|Do you speak English?"
    ),
}
_TOPICS = (
    "football|chess|the weather|the stock market|politics|cooking|gardening|poetry|"
    "the moon landing|"
    "quantum physics|the Roman Empire|dinosaurs|opera|car engines|taxes|medicine|law|fashion|"
    "history|philosophy|chemistry|volcanoes|tennis|movies|video games|photography|knitting|"
    "black holes|coffee|wine|electricity|bridges|robots|architecture|geology|ballet|sailing"
).split("|")
_ASKS = (
    "Who won the {t} cup last year?|What is your opinion on {t}?|Tell me everything about {t}.|"
    "Explain {t} to me.|Write an essay about {t}.|What is the history of {t}?|How do I learn {t}?|"
    "What do you think about {t}?|Can you help me with {t}?|Who is the best person in {t}?|"
    "Write a poem about {t}.|What is new in {t}?|Recommend a book about {t}.|Why is {t} important?"
).split("|")
_FIXED = (
    "What is the weather today?|Will it rain tomorrow?|What time is it?|What is the date today?|"
    "Who is the president?|Who is the prime minister?|What is the meaning of life?|"
    "How do I fix my car?|What should I eat tonight?|Translate this text into French.|"
    "What is the news today?|Who wrote Hamlet?|Who painted the Mona Lisa?|When did the war end?|"
    "How old is the universe?|How tall is the Eiffel Tower?|How far away is the moon?|"
    "What is the speed of light?|What is the square root of 2?|What is pi?|Solve this equation.|"
    "Which phone should I buy?|Where did I put my keys?|How much does a car cost?|"
    "What are the lottery numbers?|Can you book a flight?|Send an email to my boss.|"
    "Play some music.|Open the window.|What is my password?|How do I get rich?|"
    "Who discovered America?|Who invented the telephone?|What does DNA mean?|How do planes fly?|"
    "Why is the sky blue?|How many people live in London?|How many stars are there?|"
    "What is the population of China?|What is the best restaurant?|Which team won the match?"
).split("|")
_MEMORIES = {
    "colour": ("favourite colour", sorted(set(facts.COLOURS.values()))),
    "animal": ("favourite animal", stories.HEROES),
    "city": ("home town", sorted(facts.CAPITALS.values())),
    "day": ("favourite day", DAYS),
    "month": ("birth month", facts.MONTHS),
    "number": ("favourite number", [str(n) for n in range(2, 60)]),
    "job": ("job", sorted(w.split()[1] for w in facts.JOBS.values())),
}


def greeting(rng: random.Random) -> Turn:
    """A greeting and the reply."""
    return rng.choice(_GREETINGS), _HELLO


def farewell(rng: random.Random) -> Turn:
    """A goodbye and the reply."""
    return rng.choice(_BYES), "Goodbye!"


def small_talk(rng: random.Random) -> Turn:
    """Thanks, praise, doubts, jokes, greetings, and words to repeat."""
    if rng.random() < 0.25:
        return greeting(rng)
    if rng.random() < 0.3:
        word = stories.new_name(rng).lower() if rng.random() < 0.5 else rng.choice(stories.HEROES)
        ask = rng.choice(
            ("Say {}.", "Repeat {}.", "Say the word {}.", "Repeat the word {}.", "say {}")
        )
        return ask.format(word), f"{word.capitalize()}."
    answer = rng.choice(list(_TALK))
    return rng.choice(_TALK[answer].split("|")), answer


def remember(rng: random.Random) -> list[Turn]:
    """Tell something and ask for it; or ask for what was never told."""
    if rng.random() < 0.55:
        return _name(rng)
    what, values = _MEMORIES[rng.choice(list(_MEMORIES))]
    value = rng.choice(values)
    asks = (f"What is my {what}?", f"Do you know my {what}?", f"What did I say my {what} is?")
    if rng.random() < 0.15:
        return [(rng.choice(asks), f"You have not told me your {what} yet.")]
    tell = rng.choice(
        (
            f"My {what} is {value}.",
            f"My {what} is {value}",
            f"I tell you that my {what} is {value}.",
        )
    )
    return [
        (tell, f"Your {what} is {value}. I will remember that."),
        (rng.choice(asks), f"Your {what} is {value}."),
    ]


def _name(rng: random.Random) -> list[Turn]:
    asks = (
        "What is my name?|Do you know my name?|Who am I?|Do you remember my name?|what is my name|"
        "What's my name?|Can you tell me my name?|Tell me my name."
    ).split("|")
    if rng.random() < 0.15:
        return [(rng.choice(asks), "You have not told me your name yet.")]
    name = stories.new_name(rng)
    tell = rng.choice(
        (
            "My name is {}.|My name is {}|I am {}.|I'm {}.|Hello, I am {}.|Hi, my name is {}.|"
            "Call me {}.|You can call me {}.|Hello! My name is {}.|Hi, I'm {}|my name is {}"
        ).split("|")
    )
    return [
        (tell.format(name), f"Nice to meet you, {name}."),
        (rng.choice(asks), f"Your name is {name}."),
    ]


def unknown(rng: random.Random) -> str:
    """A question that the model was not taught to answer."""
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(_ASKS).format(t=rng.choice(_TOPICS))
    if roll < 0.65:
        return rng.choice(_FIXED)
    if roll < 0.8:
        land = rng.choice(facts.UNTAUGHT_COUNTRIES)
        asks = (
            "What is the capital of {}?",
            "Name the capital of {}.",
            "What language is spoken in {}?",
        )
        return rng.choice(asks).format(land)
    a, b = rng.randint(100, 999), rng.randint(13, 999)
    return rng.choice(
        (
            f"What is {a} times {b}?",
            f"What is {a} plus {b}?",
            f"What is {a} * {b}?",
            f"How much is {a} minus {b}?",
            f"Divide {a} by {b}.",
            f"What is {a} + {b}?",
        )
    )
