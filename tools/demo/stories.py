"""A generator of short children's stories: the prose domain, and the stories told in dialogues."""

from __future__ import annotations

import random

HEROES = (
    "fox bear rabbit mouse owl hedgehog squirrel wolf otter badger frog duck goose cat dog horse "
    "donkey goat lamb pony turtle crow robin sparrow beaver mole deer lion tiger elephant monkey"
).split()
PEOPLE = (
    "baker fisherman farmer miller king queen prince princess sailor shepherd tailor gardener "
    "teacher painter knight wizard giant boy girl grandmother carpenter postman clockmaker"
).split()
TRAITS = (
    "brave shy clever lazy curious kind proud old young tiny gentle hungry lonely cheerful careful "
    "stubborn patient sleepy honest forgetful quiet greedy busy tired merry"
).split()
PLACES = (
    "the forest|the old mill|a small village|the river|a green valley|the seashore|"
    "a snowy mountain|"
    "the market|a quiet garden|the edge of the wood|a dark cave|the castle|an island|the meadow|"
    "a busy harbour|a farm on the hill|the library|a tall tower|the bridge|a deep lake"
).split("|")
THINGS = (
    "a golden key|a red balloon|an old map|a silver bell|a wooden boat|a warm coat|a loaf of bread|"
    "a blue stone|a lost letter|a basket of apples|a little lamp|a broken clock|a new kite|a flute|"
    "a jar of honey|a magic seed|a shiny coin|a book of songs|a woollen hat|a small drum|a lantern"
).split("|")
WEATHER = (
    "It was a warm summer morning.|It had rained all night.|Snow lay on the ground.|"
    "The wind was strong that day.|The sun was setting.|It was a cold winter evening.|"
    "The leaves were turning yellow.|There was fog over the fields.|The stars were bright.|"
    "It was the first day of spring."
).split("|")
PROBLEMS = (
    "could not find the way home|had lost {thing}|was afraid of the dark|had no friends|"
    "wanted to see the sea|was looking for {thing}|could not sleep|was very hungry|"
    "wanted to learn to sing|had promised to bring {thing} to a friend|"
    "had broken {thing} by mistake|wanted to cross the river|had never seen snow|"
    "had to choose between work and play"
).split("|")
HELPS = (
    "gave {him} {thing}|showed {him} a safe path|told {him} not to give up|shared {his} supper|"
    "sang a song with {him}|carried {him} across the water|lent {him} {thing}|"
    "taught {him} a useful trick|waited with {him} until morning|laughed and offered to help|"
    "asked three hard questions|promised to come along"
).split("|")
TURNS = (
    "At first nothing happened.|But then they heard a strange noise.|Suddenly it began to rain.|"
    "They walked for a long time.|Together they tried again.|They looked under every stone.|"
    "After a while they sat down to rest.|The way was longer than they had thought.|"
    "Nobody had ever tried that before.|They climbed to the top and looked around.|"
    "They counted to ten and opened the door.|In the end it was quite simple."
).split("|")
ENDS = (
    "So the {hero} went home happy|From that day on they were friends|"
    "That night everyone slept well|"
    "And the {hero} never forgot that day|They shared a big cake and told stories until late|"
    "The {hero} smiled and said thank you|Everybody in the village was glad|"
    "And if you go there today, you may still meet them|The {hero} had learned to be patient|"
    "Since then the {hero} always shares with others"
).split("|")
SAID = (
    '"Do not worry," said the {helper}, "I know what to do."|'
    '"What is the matter?" asked the {helper}.|'
    '"I can help you," said the {helper}.|"Please help me," said the {hero}.|'
    '"Follow me," said the {helper} softly.|"That is a good idea," said the {hero}.|'
    '"I have never heard of such a thing," said the {helper}.|"We must hurry," said the {hero}.|'
    '"Why are you sad?" asked the {helper}.|"Look over there!" cried the {hero}.'
).split("|")
SYLLABLES = "ba be bi bo da de di do fa fi ka ke ki ko la le li lo ma me mi mo na ne ni no".split()
SYLLABLES += "pa pe pi ra re ri ro sa se si so ta te ti to va ve vi za zo".split()
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olivia Paul Rosa Sam "
    "Tina Victor Wendy Max Lena Tom Lucy Peter Julia Mark Sophie Daniel Eva Simon Laura Adam Maria "
    "Oscar Nina Robert Alice George Helen Martin Jane Philip Sara Lukas Amy Carl Diana Erik Fiona"
).split()


def new_name(rng: random.Random) -> str:
    """A first name: a common one, or one made of syllables."""
    if rng.random() < 0.5:
        return rng.choice(NAMES)
    name = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    return (name + rng.choice(("", "", "n", "l", "s", "r"))).capitalize()


def _fill(text: str, rng: random.Random, words: dict[str, str]) -> str:
    return text.format(thing=rng.choice(THINGS), **words)


def short_story(rng: random.Random, hero: str) -> str:
    """Four sentences about `hero`, as the model tells them in a dialogue."""
    helper = rng.choice([h for h in HEROES if h != hero])
    words = {"hero": hero, "helper": helper, "him": "the " + hero, "his": "a"}
    trait = rng.choice(TRAITS)
    problem = _fill(rng.choice(PROBLEMS), rng, words)
    return (
        f"Once upon a time {_a(trait)} {hero} lived near {rng.choice(PLACES)}. "
        f"One day the {hero} met a {helper} who {problem}. "
        f"{_fill(rng.choice(SAID), rng, words)} "
        f"{_fill(rng.choice(ENDS), rng, words)}."
    )


def long_story(rng: random.Random) -> str:
    """A story of several paragraphs for the prose domain."""
    boy = rng.random() < 0.5
    hero, helper = rng.sample(HEROES + PEOPLE, 2)
    name = new_name(rng)
    words = {
        "hero": hero,
        "helper": helper,
        "him": "him" if boy else "her",
        "his": "some",
    }
    he = "he" if boy else "she"
    his = "his" if boy else "her"
    trait, other = rng.sample(TRAITS, 2)
    place, goal = rng.sample(PLACES, 2)
    opening = rng.choice(
        (
            f"There once was {_a(trait)} {hero} called {name} who lived near {place}.",
            f"Near {place} lived {_a(trait)} {hero}. {he.capitalize()} was called {name}.",
            f"Long ago, {_a(trait)} {hero} named {name} came to {place}.",
            f"{name} was {_a(trait)} {hero}, and {his} house stood near {place}.",
        )
    )
    lines = [f"{opening} {rng.choice(WEATHER)}"]
    problem = _fill(rng.choice(PROBLEMS), rng, words)
    lines.append(f"{name} {problem}, so {he} set out for {goal}.")
    for _ in range(rng.randint(1, 3)):
        part = [
            f"{rng.choice(('On the way', 'Near ' + rng.choice(PLACES), 'Before long'))} "
            f"{he} met {_a(other)} {helper}."
        ]
        part.append(_fill(rng.choice(SAID), rng, words))
        part.append(f"The {helper} {_fill(rng.choice(HELPS), rng, words)}.")
        part.extend(rng.sample(TURNS, rng.randint(1, 2)))
        if rng.random() < 0.5:
            part.append(_fill(rng.choice(SAID), rng, words))
        lines.append(" ".join(part))
        helper, other = rng.choice([h for h in HEROES if h != hero]), rng.choice(TRAITS)
        words["helper"] = helper
    lines.append(f"{_fill(rng.choice(ENDS), rng, words)}.")
    return "\n".join(lines)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' or word == 'honest' else 'a'} {word}"
