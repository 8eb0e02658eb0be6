"""Question and answer makers: one function per topic, each a pure draw from the random source it is given."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One user message and the assistant's reply to it."""

    question: str
    answer: str


Maker = Callable[[random.Random], Exchange]

ANIMALS: Final = facts.KINDS["an animal"]

ADDITION_RANGES: Final[tuple[tuple[int, int, int], ...]] = ((9, 9, 55), (20, 20, 25), (99, 99, 20))
"""`(largest left, largest right, weight)`: how often the two terms are drawn from which range."""

ADDITION_FORMS: Final[tuple[tuple[str, int], ...]] = (
    ("What is {a} + {b}?", 12),
    ("What is {a}+{b}?", 3),
    ("{a} + {b} = ?", 2),
    ("{a} + {b} =", 3),
    ("{a}+{b}=", 4),
    ("{a} + {b}", 2),
    ("{a}+{b}", 1),
    ("What is {a} plus {b}?", 3),
    ("{a} plus {b}", 1),
    ("Add {a} and {b}.", 3),
    ("How much is {a} + {b}?", 2),
    ("How much is {a} plus {b}?", 1),
    ("Calculate {a} + {b}.", 2),
    ("Compute {a} + {b}.", 1),
    ("What is the sum of {a} and {b}?", 2),
    ("Can you add {a} and {b}?", 1),
)

SMALL_TALK: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        ("Hello!", "Hello.", "Hi!", "Hi.", "Hi there!", "Hey!", "Hello there!", "Hi Tiny!", "Hello Tiny!", "Hey Tiny!"),
        ("Hello! How can I help you?",),
    ),
    (("Good morning!", "Good morning, Tiny."), ("Good morning! How can I help you?",)),
    (("Good evening!", "Good evening, Tiny."), ("Good evening! How can I help you?",)),
    (("Good night!", "Good night, Tiny.", "I am going to bed."), ("Good night! Sleep well.",)),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?",
         "How do you feel?", "How are you doing?", "How are things?", "What is up?"),
        ("I am fine, thank you. How are you?",),
    ),
    (("I am fine.", "I am well, thank you.", "I am good.", "I feel great."), ("I am glad to hear that.",)),
    (("I am sad.", "I feel bad.", "I am not well.", "I am tired."), ("I am sorry to hear that.",)),
    (("I am happy.", "I am so happy today!", "I had a good day."), ("That is great!",)),
    (("I am bored.", "What should I do?"), ("You could read a book.",)),
    (("I am hungry.", "I want to eat."), ("You could eat an apple.",)),
    (("I am thirsty.", "I want a drink."), ("You could drink some water.",)),
    (("Thank you!", "Thanks.", "Thank you very much.", "Thanks a lot!", "Thank you, Tiny."), ("You are welcome!",)),
    (("Goodbye!", "Bye.", "Bye bye!", "See you later.", "See you!", "Goodbye, Tiny."), ("Goodbye! See you soon.",)),
    (("Sorry.", "I am sorry.", "My mistake."), ("No problem.",)),
    (
        ("What is your name?", "What are you called?", "Your name?", "What is your name, please?", "Tell me your name.",
         "What should I call you?", "Do you have a name?"),
        ("My name is Tiny.",),
    ),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "Tell me who you are."),
        ("I am Tiny, a small language model.",),
    ),
    (("Are you a human?", "Are you a person?", "Are you real?"), ("No, I am a small language model.",)),
    (("Are you a robot?", "Are you a computer?", "Are you a machine?"), ("I am a small language model.",)),
    (("Are you Tiny?", "Is your name Tiny?"), ("Yes, I am Tiny.",)),
    (("How old are you?", "What is your age?", "When were you born?"), ("I am a model, so I have no age.",)),
    (("Where do you live?", "Where are you?", "Where are you from?"), ("I live in a computer.",)),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Can you help me?", "Help me."),
        ("I can chat, add small numbers, copy and spell words.",),
    ),
    (("Who made you?", "Who built you?", "Where do you come from?", "Who trained you?"),
     ("A script made me from text that it wrote itself.",)),
    (("Do you like music?", "Do you like me?", "Do you like to talk?", "Do you like your work?"), ("Yes, I do.",)),
    (("Are you happy?", "Are you ready?", "Are you there?", "Can you hear me?"), ("Yes, I am.",)),
    (("Are you smart?", "Are you clever?", "Do you know everything?", "Are you good at sums?"),
     ("No, I am very small.",)),
    (("What do you eat?", "What do you drink?", "Do you eat?", "Do you sleep?"), ("I am a model, so I do not.",)),
    (("What is your favourite colour?", "What colour do you like?"), ("I like blue.",)),
    (("What is your favourite animal?", "What animal do you like?"), ("I like cats.",)),
    (("What is your favourite food?", "What food do you like?"), ("I do not eat, but apples look nice.",)),
    (("What is your favourite number?", "What number do you like?"), ("I like 7.",)),
    (("What do you do?", "What is your job?", "What is your work?"), ("I answer short questions.",)),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
     ("Why did the hen cross the road? To get to the other side.",)),
    (("Tell me a story.", "Do you know a story?", "Tell me something."),
     ("Once there was a cat. It found a fish. The end.",)),
    (("Sing a song.", "Can you sing?", "Sing for me."), ("La la la!",)),
    (("Say something nice.", "Be nice to me.", "Cheer me up."), ("You are a good friend.",)),
    (("I love you.", "I like you.", "You are nice.", "You are great!", "Good job!", "Well done!"),
     ("Thank you! You are kind.",)),
    (("You are wrong.", "That is wrong.", "No, that is not right."), ("I am sorry. I make mistakes.",)),
    (("Yes.", "Okay.", "Right.", "Good."), ("Good!",)),
)  # fmt: skip

UNKNOWN_FORMS: Final = (
    "What is {topic}?",
    "Who is {topic}?",
    "Where is {topic}?",
    "When is {topic}?",
    "Why is {topic} so important?",
    "How does {topic} work?",
    "Tell me about {topic}.",
    "What do you think of {topic}?",
    "What do you know about {topic}?",
    "Explain {topic}.",
    "Who made {topic}?",
    "Who wrote about {topic}?",
    "How much does {topic} cost?",
    "Can you explain {topic}?",
    "When did {topic} begin?",
    "What happened to {topic}?",
    "Do you remember {topic}?",
    "How do I find {topic}?",
    "Why do people like {topic}?",
    "How can I fix {topic}?",
    "Where is {topic} now?",
    "Is {topic} any good?",
    "Write a poem about {topic}.",
)

UNKNOWN_ABOUT_SELF: Final = (
    "What do you {verb}?",
    "What did you {verb} yesterday?",
    "When do you {verb}?",
    "Why do you {verb}?",
    "Where do you {verb}?",
    "How do you {verb}?",
    "Who taught you to {verb}?",
    "Where is your {noun}?",
    "What is your {noun} made of?",
    "What is your favourite {noun}?",
    "How much is your {noun}?",
    "Who has your {noun}?",
    "Tell me about your {noun}.",
    "What colour is your {noun}?",
    "Who is your {noun}?",
)

VERBS: Final = (
    "make", "sell", "build", "carry", "fix", "paint", "cook", "read", "write", "play", "work", "travel", "sing",
    "study", "collect", "grow", "hide", "wear", "buy", "dream of", "use", "need", "want", "see", "hear", "keep",
    "start", "finish",
)  # fmt: skip


def small_talk(rng: random.Random) -> Exchange:
    questions, answers = rng.choice(SMALL_TALK)
    return Exchange(question=rng.choice(questions), answer=rng.choice(answers))


def addition(rng: random.Random) -> Exchange:
    largest_left, largest_right = rng.choices(
        [(left, right) for left, right, _ in ADDITION_RANGES], [weight for *_, weight in ADDITION_RANGES]
    )[0]
    a, b = rng.randint(0, largest_left), rng.randint(0, largest_right)
    form = rng.choices([form for form, _ in ADDITION_FORMS], [weight for _, weight in ADDITION_FORMS])[0]
    return Exchange(question=form.format(a=a, b=b), answer=str(a + b))


def addition_story(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    name, thing = rng.choice(facts.PEOPLE), rng.choice(("apples", "books", "cups", "eggs", "balls", "pens"))
    form = rng.choice(
        (
            "{person} has {a} {thing} and gets {b} more. How many {thing} does {person} have?",
            "I have {a} {thing}. You give me {b} more. How many {thing} do I have?",
            "There are {a} {thing} here and {b} {thing} there. How many {thing} are there?",
        )
    )
    return Exchange(question=form.format(person=name, a=a, b=b, thing=thing), answer=str(a + b))


def subtraction(rng: random.Random) -> Exchange:
    a = rng.randint(0, 18)
    b = rng.randint(0, min(a, 9))
    form = rng.choice(("What is {a} - {b}?", "{a} - {b} =", "{a}-{b}=", "What is {a} minus {b}?", "Take {b} from {a}."))
    return Exchange(question=form.format(a=a, b=b), answer=str(a - b))


def multiplication(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    form = rng.choice(("What is {a} * {b}?", "{a} * {b} =", "{a}*{b}=", "What is {a} times {b}?"))
    return Exchange(question=form.format(a=a, b=b), answer=str(a * b))


def number_order(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(21), 2)
    question, answer = rng.choice(
        (
            (f"Which is bigger, {a} or {b}?", max(a, b)),
            (f"Which is smaller, {a} or {b}?", min(a, b)),
            (f"What number comes after {a}?", a + 1),
            (f"What comes after {a}?", a + 1),
            (f"What number comes before {a + 1}?", a),
        )
    )
    return Exchange(question=question, answer=str(answer))


def number_words(rng: random.Random) -> Exchange:
    number = rng.randrange(len(facts.NUMBER_WORDS))
    word = facts.NUMBER_WORDS[number]
    return rng.choice(
        (
            Exchange(question=f"Write {number} as a word.", answer=word),
            Exchange(question=f"Write {word} as a number.", answer=str(number)),
            Exchange(question=f"What number is {word}?", answer=str(number)),
        )
    )


def counting(rng: random.Random) -> Exchange:
    first = rng.choice((1, 1, 1, rng.randint(2, 9)))
    last = first + rng.randint(1, 9)
    forms = [f"Count from {first} to {last}."]
    if first == 1:
        forms += [f"Count to {last}.", f"Can you count to {last}?", f"Please count to {last}."]
    return Exchange(question=rng.choice(forms), answer=" ".join(str(n) for n in range(first, last + 1)))


def copying(rng: random.Random) -> Exchange:
    phrase = rng.choice((_phrase, _word_row, _word_row, _nonsense_row, _digits))(rng)
    form = rng.choice(
        ("Repeat: {}", "Say: {}", "Copy: {}", "Repeat after me: {}", "Please repeat: {}", "Copy this: {}", "Echo: {}",
         'Say "{}".', "Write: {}")
    )  # fmt: skip
    return Exchange(question=form.format(phrase), answer=phrase)


def spelling(rng: random.Random) -> Exchange:
    word = _word(rng)
    form = rng.choice(
        (
            "Spell {}.",
            "How do you spell {}?",
            "Can you spell {}?",
            "Spell the word {}.",
            "Please spell {}.",
        )
    )
    return Exchange(question=form.format(word), answer="-".join(word))


def unspelling(rng: random.Random) -> Exchange:
    word = _word(rng)
    form = rng.choice(("What word is {}?", "What does {} spell?", "Join {}."))
    return Exchange(question=form.format("-".join(word)), answer=word)


def letters(rng: random.Random) -> Exchange:
    word = _word(rng)
    return rng.choice(
        (
            Exchange(question=f"What is the first letter of {word}?", answer=word[0]),
            Exchange(question=f"What is the last letter of {word}?", answer=word[-1]),
            Exchange(question=f"How many letters are in {word}?", answer=str(len(word))),
            Exchange(question=f"What letter does {word} start with?", answer=word[0]),
        )
    )


def reversing(rng: random.Random) -> Exchange:
    word = rng.choice((_word(rng), "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 4)))))
    form = rng.choice(("Reverse {}.", "Reverse the word {}.", "Write {} backwards.", "Spell {} backwards."))
    return Exchange(question=form.format("-".join(word)), answer="-".join(reversed(word)))


def letter_case(rng: random.Random) -> Exchange:
    word = _word(rng)
    return rng.choice(
        (
            Exchange(question=f"Write {word} in upper case.", answer=word.upper()),
            Exchange(question=f"Write {word} in capital letters.", answer=word.upper()),
            Exchange(question=f"Write {word.upper()} in lower case.", answer=word),
            Exchange(question=f"Write {word.upper()} in small letters.", answer=word),
        )
    )


def alphabet(rng: random.Random) -> Exchange:
    place = rng.randrange(25)
    here, after = string.ascii_lowercase[place : place + 2]
    return rng.choice(
        (
            Exchange(question=f"What letter comes after {here}?", answer=after),
            Exchange(question=f"What letter comes before {after}?", answer=here),
        )
    )


def capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(facts.CAPITALS.items()))
    return rng.choice(
        (
            Exchange(question=f"What is the capital of {country}?", answer=city + "."),
            Exchange(question=f"Name the capital of {country}.", answer=city + "."),
            Exchange(question=f"Which city is the capital of {country}?", answer=city + "."),
            Exchange(question=f"Tell me the capital of {country}.", answer=city + "."),
            Exchange(question=f"Where is {city}?", answer=f"In {country}."),
            Exchange(question=f"In which country is {city}?", answer=f"In {country}."),
        )
    )


def language(rng: random.Random) -> Exchange:
    country, tongue = rng.choice(list(facts.LANGUAGES.items()))
    form = rng.choice(("What language do people speak in {}?", "Which language is spoken in {}?"))
    return Exchange(question=form.format(country), answer=tongue + ".")


def colour(rng: random.Random) -> Exchange:
    thing, shade = rng.choice(list(facts.COLOURS_OF.items()))
    form = rng.choice(("What colour is {}?", "What is the colour of {}?", "Which colour is {}?", "What color is {}?"))
    return Exchange(question=form.format(thing), answer=shade.capitalize() + ".")


def animal(rng: random.Random) -> Exchange:
    sounding, sound = rng.choice(list(facts.SOUNDS.items()))
    walking, legs = rng.choice(list(facts.LEGS.items()))
    parent, young = rng.choice(list(facts.YOUNG.items()))
    return rng.choice(
        (
            Exchange(question=f"What does {_a(sounding)} say?", answer=sound.capitalize() + "."),
            Exchange(question=f"What sound does {_a(sounding)} make?", answer=sound.capitalize() + "."),
            Exchange(question=f"Which animal says {sound}?", answer=_a(sounding).capitalize() + "."),
            Exchange(question=f"How many legs does {_a(walking)} have?", answer=str(legs)),
            Exchange(question=f"What is a young {parent} called?", answer=_a(young).capitalize() + "."),
        )
    )


def opposite(rng: random.Random) -> Exchange:
    pair = rng.choice(facts.OPPOSITES)
    this, that = pair if pair[1] == "light" or rng.random() < 0.5 else pair[::-1]
    form = rng.choice(("What is the opposite of {}?", "Opposite of {}?", "Name the opposite of {}."))
    return Exchange(question=form.format(this), answer=that.capitalize() + ".")


def calendar(rng: random.Random) -> Exchange:
    names = rng.choice((facts.DAYS, facts.MONTHS, facts.SEASONS))
    unit = {facts.DAYS: "day", facts.MONTHS: "month", facts.SEASONS: "season"}[names]
    here = rng.randrange(len(names))
    before, after = names[here - 1], names[(here + 1) % len(names)]
    return rng.choice(
        (
            Exchange(question=f"What {unit} comes after {names[here]}?", answer=_sentence(after)),
            Exchange(question=f"What {unit} comes before {names[here]}?", answer=_sentence(before)),
            Exchange(question=f"Which {unit} is after {names[here]}?", answer=_sentence(after)),
        )
    )


def kind_of_thing(rng: random.Random) -> Exchange:
    kind, members = rng.choice(list(facts.KINDS.items()))
    thing = rng.choice(members)
    other = rng.choice([name for name in facts.KINDS if name != kind and thing not in facts.KINDS[name]])
    right, wrong = f"Is {_named(thing)} {kind}?", f"Is {_named(thing)} {other}?"
    return rng.choice(
        (
            Exchange(question=f"Name {kind}.", answer=_sentence(members[0])),
            Exchange(question=right, answer="Yes."),
            Exchange(question=wrong, answer="No."),
        )
    )


def plain_fact(rng: random.Random) -> Exchange:
    question, answer = rng.choice(facts.PLAIN_FACTS)
    return Exchange(question=question, answer=answer)


def unknown(rng: random.Random) -> Exchange:
    """A question outside the model's world; the reply is always the same, so that it becomes the habit."""
    if rng.random() < 0.4:
        question = rng.choice(UNKNOWN_ABOUT_SELF).format(verb=rng.choice(VERBS), noun=_unknown_noun(rng))
    else:
        topic = rng.choice((_topic, _topic, _odd_topic))(rng)
        question = rng.choice(UNKNOWN_FORMS).format(topic=topic)
    return Exchange(question=question, answer="I don't know.")


def person(rng: random.Random) -> str:
    """A name from the list or an invented one, so that names must be copied and cannot be guessed."""
    return rng.choice(facts.PEOPLE) if rng.random() < 0.5 else _nonsense(rng).capitalize()


def _unknown_noun(rng: random.Random) -> str:
    return rng.choice([noun for noun in facts.NOUNS if noun not in ("number", "song", "story", "dream")])


def _topic(rng: random.Random) -> str:
    return rng.choice(facts.UNKNOWN_TOPICS)


def _odd_topic(rng: random.Random) -> str:
    owner = rng.choice(("the", "my", "your", f"{rng.choice(facts.PEOPLE)}'s"))
    return f"{owner} {rng.choice(facts.ADJECTIVES)} {rng.choice(facts.NOUNS)}"


def _word(rng: random.Random) -> str:
    return rng.choice(facts.NOUNS) if rng.random() < 0.75 else _nonsense(rng)


def _phrase(rng: random.Random) -> str:
    adjective, noun, place = rng.choice(facts.ADJECTIVES), rng.choice(facts.NOUNS), rng.choice(facts.PLACES)
    return rng.choice(
        (f"the {adjective} {noun}", f"{adjective} {noun}", f"I see a {noun} in {place}", f"we go to {place}", noun)
    )


def _word_row(rng: random.Random) -> str:
    return " ".join(rng.choices((*facts.NOUNS, *facts.ADJECTIVES, *facts.PEOPLE, *VERBS), k=rng.randint(2, 6)))


def _nonsense(rng: random.Random) -> str:
    pairs = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(pairs) + rng.choice(("", "", "n", "s", "r", "t"))


def _nonsense_row(rng: random.Random) -> str:
    return " ".join(_nonsense(rng) for _ in range(rng.randint(1, 3)))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=rng.randint(1, 5)))


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _named(thing: str) -> str:
    uncounted = any(thing in facts.KINDS[kind] for kind in ("a metal", "a drink", "a colour"))
    return thing if uncounted or thing[0].isupper() else _a(thing)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
