"""The training text: an endless, seeded stream of short documents.

Most documents are conversations made of one to four exchanges; the rest are passages of plain text. The stream depends
on its seed alone, so two seeds give a training set and a held-out set of the same kind. The questions come from closed
lists of templates: held-out text is new as a whole, but most of its sentences occur in the training set too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import exchanges
import facts
from exchanges import Exchange, Maker

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    text: str


Document = Conversation | Passage

PASSAGE_SHARE: Final = 0.08
MEMORY_SHARE: Final = 0.07
NAMED_SHARE: Final = 0.05
SYSTEM_SHARE: Final = 0.2
ONE_TOPIC_SHARE: Final = 0.35
"""How many conversations stay on one topic, as few-shot prompts do."""

TOPICS: Final[dict[str, tuple[Maker, int]]] = {
    "small talk": (exchanges.small_talk, 20),
    "addition": (exchanges.addition, 5),
    "addition in words": (exchanges.addition_story, 1),
    "subtraction": (exchanges.subtraction, 2),
    "multiplication": (exchanges.multiplication, 1),
    "number order": (exchanges.number_order, 2),
    "number words": (exchanges.number_words, 1),
    "counting": (exchanges.counting, 3),
    "copying": (exchanges.copying, 14),
    "spelling": (exchanges.spelling, 6),
    "joining letters": (exchanges.unspelling, 2),
    "letters of a word": (exchanges.letters, 3),
    "reversing": (exchanges.reversing, 3),
    "letter case": (exchanges.letter_case, 3),
    "alphabet": (exchanges.alphabet, 1),
    "capitals": (exchanges.capital, 6),
    "languages": (exchanges.language, 2),
    "colours": (exchanges.colour, 3),
    "animals": (exchanges.animal, 4),
    "opposites": (exchanges.opposite, 4),
    "calendar": (exchanges.calendar, 2),
    "kinds of things": (exchanges.kind_of_thing, 3),
    "plain facts": (exchanges.plain_fact, 3),
    "unknown": (exchanges.unknown, 8),
}
"""Each topic's maker and its weight among the exchanges of a conversation."""

SYSTEM_PROMPTS: Final = (
    "You are Tiny, a small and friendly assistant.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are Tiny.",
    "Be kind and brief.",
    "You are a helpful assistant. Answer in a few words.",
)


def documents(seed: int, n: int) -> Iterator[Document]:
    """Yield the first `n` documents of the stream that belongs to `seed`."""
    rng = random.Random(seed)
    for _ in range(n):
        yield _document(rng)


def _document(rng: random.Random) -> Document:
    draw = rng.random()
    if draw < PASSAGE_SHARE:
        return _passage(rng)
    if draw < PASSAGE_SHARE + MEMORY_SHARE:
        return _remembered_name(rng)
    if draw < PASSAGE_SHARE + MEMORY_SHARE + NAMED_SHARE:
        return _given_name(rng)
    return _conversation(_exchanges(rng), system=_system(rng))


def _exchanges(rng: random.Random) -> list[Exchange]:
    count = rng.choices((1, 2, 3, 4), (45, 25, 18, 12))[0]
    makers = _makers(rng, count)
    if rng.random() < ONE_TOPIC_SHARE:
        makers = makers[:1] * count
    return [_varied(rng, maker(rng)) for maker in makers]


def _makers(rng: random.Random, count: int) -> list[Maker]:
    weights = [weight for _, weight in TOPICS.values()]
    return rng.choices([maker for maker, _ in TOPICS.values()], weights, k=count)


def _varied(rng: random.Random, exchange: Exchange) -> Exchange:
    """Write the question as a person might: contracted, in lower case, without its mark, or after a polite word."""
    question = exchange.question
    if rng.random() < 0.1:
        question = question.replace(" is ", "'s ", 1) if question.startswith(("What is ", "Who is ")) else question
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.2 and question[-1] in "?.!":
        question = question[:-1]
    if rng.random() < 0.06:
        question = rng.choice(("Please tell me: ", "Hi! ", "Hello. ", "Tiny, ", "Okay. ", "One more: ")) + question
    return Exchange(question=question, answer=exchange.answer)


def _system(rng: random.Random) -> str | None:
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None


def _conversation(pairs: list[Exchange], *, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message(role="system", content=system)]
    for pair in pairs:
        messages.append(Message(role="user", content=pair.question))
        messages.append(Message(role="assistant", content=pair.answer))
    return Conversation(messages=tuple(messages))


def _remembered_name(rng: random.Random) -> Conversation:
    """The user gives a name and asks for it, later or in the same breath."""
    person = exchanges.person(rng)
    given = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi! My name is {}.", "Call me {}."))
    asked = rng.choice(("What is my name?", "Who am I?", "Do you know my name?", "Say my name."))
    answer = f"Your name is {person}."
    if rng.random() < 0.3:
        return _conversation([Exchange(question=f"{given.format(person)} {asked}", answer=answer)], system=_system(rng))
    greeting = Exchange(question=given.format(person), answer=f"Nice to meet you, {person}!")
    between = _exchanges(rng)[: rng.choice((0, 0, 1, 2))]
    recalled = _varied(rng, Exchange(question=asked, answer=answer))
    return _conversation([greeting, *between, recalled], system=_system(rng))


def _given_name(rng: random.Random) -> Conversation:
    """The system message gives the assistant another name."""
    person = exchanges.person(rng)
    system = rng.choice(("You are {}.", "Your name is {}.", "You are {}, a friendly assistant.")).format(person)
    asked = rng.choice(("What is your name?", "What are you called?", "Tell me your name.", "Do you have a name?"))
    pairs = [_varied(rng, Exchange(question=asked, answer=f"My name is {person}.")), *_exchanges(rng)[:2]]
    rng.shuffle(pairs)
    return _conversation(pairs, system=system)


def _passage(rng: random.Random) -> Passage:
    sentences = [_sentence(rng) for _ in range(rng.randint(2, 6))]
    return Passage(text=" ".join(sentences))


def _sentence(rng: random.Random) -> str:
    person, other = rng.sample(facts.PEOPLE, 2)
    adjective, noun, place = rng.choice(facts.ADJECTIVES), rng.choice(facts.NOUNS), rng.choice(facts.PLACES)
    country, city = rng.choice(list(facts.CAPITALS.items()))
    thing, shade = rng.choice(list(facts.COLOURS_OF.items()))
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return rng.choice(
        (
            f"{person} went to {place}.",
            f"{person} and {other} met at {place}.",
            f"{person} found the {adjective} {noun} near {place}.",
            f"The {noun} was {adjective} and {rng.choice(facts.ADJECTIVES)}.",
            f'"Look at the {noun}!" said {person}.',
            f'"Where is my {noun}?" asked {other}. "It is in {place}," said {person}.',
            f"In the morning, {person} made a {adjective} {noun} for {other}.",
            f"{person} works in {place} and sells the {adjective} {noun} there.",
            f"They were happy because the {noun} was not {adjective}.",
            f"Then {person} gave the {noun} to {other}, who lived near {place}.",
            f"Every {rng.choice(facts.DAYS)}, {person} walks to {place} with {other}.",
            f"The capital of {country} is {city}.",
            f"{thing.capitalize()} is {shade}.",
            f"{a} + {b} = {a + b}.",
        )
    )
