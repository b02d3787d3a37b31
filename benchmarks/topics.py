"""Questions on the topics of MT-Bench, for gates over agents of which each knows one.

Those of MT-Bench (Zheng et al. 2023) and GSM8K (Cobbe et al. 2021) come from files; there are too few of them, or of
one topic alone, so templates give the rest. Those that are held out are of other templates.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

TOPICS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

_THINGS = (
    "a lighthouse", "the winter", "an old library", "my grandmother", "a night train", "the sea", "a broken clock",
    "a small bakery", "two rivals", "a lost letter", "the first snow", "a market", "an island", "a garden", "a robot",
)  # fmt: skip
_PEOPLE = (
    "a pirate", "Sherlock Holmes", "a medieval knight", "a strict teacher", "a ship's captain", "a film critic",
    "an alien", "a tour guide", "Albert Einstein", "a fortune teller", "a detective", "a chef", "a wizard", "a judge",
)  # fmt: skip
_CODE = (
    "a binary tree", "a linked list", "a CSV file", "prime numbers", "a hash map", "palindromes", "a graph", "a queue",
    "JSON documents", "a matrix", "a REST interface", "sorted arrays", "a cache", "regular expressions", "a stack",
)  # fmt: skip
_SCIENCE = (
    "photosynthesis", "black holes", "superconductors", "DNA replication", "plate tectonics", "entropy", "vaccines",
    "semiconductors", "the periodic table", "lasers", "enzymes", "radioactivity", "fluid turbulence", "batteries",
)  # fmt: skip
_HISTORY = (
    "the French Revolution", "Stoic philosophy", "the Silk Road", "the Renaissance", "colonialism", "Kant's ethics",
    "the Cold War", "ancient Athens", "the printing press", "feudal Japan", "the Roman Republic", "existentialism",
)  # fmt: skip
_FACTS = (
    "Anna met Tom in Rome", "Apple reported 3 billion", "Kim rated the film 8/10", "order 17 has 3 pens",
    "Dr. Hart came at 9:30", "the bill was 42 euros", "flight KL12 left at noon", "Li won gold in Oslo",
    "rain fell on 3 May", "Lima has 10 million",
    "Shell lost 5 percent", "Greta moved to Bonn", "the bridge is 300 m long", "bus 7 was late", "Ray bought 2 cups",
)  # fmt: skip
_NAMES = ("Anna", "Ben", "Carla", "David", "Ella", "Farid", "Greta", "Hugo", "Iris", "Jonas", "Kim", "Lena")

_TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "writing": (
        (
            "Write a short story about {x} and {y}.",
            "Compose a poem about {x}, {y} and {z}.",
            "Draft an opening paragraph of a novel on {x} and {y}.",
            "Write a persuasive email that mentions {x} and {y}.",
            "Compose a heartfelt speech about {x}, and end it with {y}.",
        ),
        ("Write a limerick about {x} and {y}.", "Draft a blog post about {x}, {y} and {z}."),
        _THINGS,
    ),
    "roleplay": (
        (
            "Pretend to be {x} who meets {y}, and introduce yourself.",
            "You are {x}. What do you say to {y}?",
            "Act as {x} and answer in character when {y} asks you the way.",
            "Imagine that you are {x}; describe your morning with {y}.",
            "Take the role of {x} and give advice to {y} and {z}.",
        ),
        ("Embody {x} and tell {y} about your greatest fear.", "Play {x} in a conversation with {y} and {z}."),
        _PEOPLE,
    ),
    "reasoning": (
        (
            "{x} is taller than {y}, and {y} is taller than {z}. Who is the shortest?",
            "{x} sits left of {y}, and {z} sits right of {y}. Who sits in the middle?",
            "If all friends of {x} are friends of {y}, and {z} is a friend of {x}, does {y} know {z}?",
            "{x} has two brothers, {y} and {z}. How many brothers does {y} have?",
            "{x} overtakes {y}, who was second in the race with {z}. In which place is {x}?",
        ),
        (
            "{x}, {y} and {z} each tell one lie. Who broke the vase if only {x} speaks the truth?",
            "{x} arrived before {y} but after {z}. Who came last?",
        ),
        _NAMES,
    ),
    "coding": (
        (
            "Write a Python function that turns {x} into {y}.",
            "Implement {x} in C++ with unit tests, and {y} on top of it.",
            "How do I debug code that handles {x} and {y} in Java?",
            "Write an efficient algorithm over {x} that uses {y}, and give its complexity.",
            "Refactor this program, which processes {x} and {y}, into classes.",
        ),
        (
            "Write a JavaScript program that validates {x} against {y}.",
            "Implement a generator in Rust that iterates over {x} and {y}.",
        ),
        _CODE,
    ),
    "extraction": (
        (
            "Extract all names and numbers from this text as JSON: {x}, {y}.",
            "List every entity in the following passage: {x}; {y}; {z}.",
            "From the text below, return a CSV of the facts: {x}, and {y}.",
            "Identify the figures mentioned in: {x}, {y} and {z}.",
            "Turn this passage into a table: {x}; {y}.",
        ),
        (
            "Given the text, output the places and dates it names: {x}, {y}.",
            "Extract the key values of this record: {x}; {y}; {z}.",
        ),
        _FACTS,
    ),
    "stem": (
        (
            "Explain how {x} and {y} are related.",
            "What physical principle is behind {x}, and behind {y}?",
            "Describe an experiment that shows {x} by means of {y}.",
            "What are the practical uses of {x} and {y} in engineering?",
            "Which open questions in science concern {x} or {y}?",
        ),
        (
            "What laws of nature govern {x} and {y}?",
            "Describe the mechanism of {x}, then that of {y}, to a student of physics.",
        ),
        _SCIENCE,
    ),
    "humanities": (
        (
            "What did {x} and {y} have in common socially?",
            "Discuss the influence of {x} and {y} on modern society.",
            "Write an essay plan on the history of {x} and its echo in {y}.",
            "How did {x}, compared with {y}, change art and culture?",
            "Compare two historians' views of {x} and {y}.",
        ),
        ("Which ethical debates surround {x} and {y}?", "What was the political legacy of {x} beside that of {y}?"),
        _HISTORY,
    ),
}


def questions(data: Path, count: int, seed: int, *, held_out: bool) -> list[tuple[str, int]]:
    """Questions with the number of their topic: all of MT-Bench's half, and as many of each topic as there is room for.

    Args:
        data: Folder of `mt_bench_question.jsonl` and `gsm8k_test.jsonl`.
        count: How many.
        seed: Of the draw.
        held_out: Whether those that nobody trains on.
    """
    dice = random.Random(seed)
    found = list(_mt_bench(data, held_out))
    gsm8k = [json.loads(line)["question"] for line in (data / "gsm8k_test.jsonl").read_text().splitlines()]
    maths = iter(gsm8k[1::2] if held_out else gsm8k[::2])
    for number in range(count - len(found)):
        topic = number % len(TOPICS)
        text = next(maths) if TOPICS[topic] == "math" else _made(TOPICS[topic], dice, held_out)
        found.append((text, topic))
    dice.shuffle(found)
    return found


def _mt_bench(data: Path, held_out: bool) -> Iterator[tuple[str, int]]:
    for number, line in enumerate((data / "mt_bench_question.jsonl").read_text().splitlines()):
        question = json.loads(line)
        if (number % 2 == 1) == held_out:
            yield question["turns"][0], TOPICS.index(question["category"])


def _made(topic: str, dice: random.Random, held_out: bool) -> str:
    known, kept, fillings = _TEMPLATES[topic]
    names = dice.sample(fillings, 3)
    return dice.choice(kept if held_out else known).format(**dict(zip("xyz", names, strict=True)))
