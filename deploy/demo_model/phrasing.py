"""Functions -> conversations: the several ways a person asks for a function, and the answers to learn.

Pure; every choice is drawn from the `Random` handed in. Two kinds of answer, and the request tells which is wanted:
- the request *is* code, or asks for "the body": the answer is the body, indented, so that request + answer is the function;
- the request asks in words, or to complete or implement: the answer is the whole function.
"""

from random import Random
from typing import NamedTuple

from deploy.demo_model.corpus import Function

SYSTEM_SHARE = 0.3
FINAL_NEWLINE_SHARE = 0.2  # of requests; chat clients mostly strip it, curl lines mostly do not
RECALL_SHARE = 0.35  # of the turns of a longer conversation; they teach the model to copy from far back in its context
TURNS_MIN, TURNS_MAX = 2, 5
LONG_CHARS_MAX = 24_000  # about 8,000 tokens, the context that is trained
SUMMARY_CHARS_MAX = 240

SYSTEMS = (
    "You are a helpful assistant that writes Python.",
    "You write short, correct Python functions.",
    "You are a Python programmer. Answer with code only.",
)
ASK_FOR_BODY = (
    "Write the body of this function:",
    "What is the body of this function?",
    "Fill in the body of this Python function:",
)
ASK_FOR_WHOLE = (
    "Complete this function:",
    "Implement this function:",
    "Finish this Python function:",
    "Complete the following Python code:",
)
ASK_AGAIN = ("Show me `{}` again.", "Repeat the function `{}`.", "What was `{}` again?", "Please write `{}` once more.")
OPENERS = ("Write a Python function", "Write a function", "Give me a Python function", "I need a Python function")
_VERBS_TEXT = """
    accept add adjust append apply build calculate call cancel change check clean clear close collect compare compile
    compress compute configure connect construct convert copy count create decode decompress define delete determine
    disconnect display dump emit encode ensure escape evaluate execute expand extract fetch fill find finish flush format
    generate get give handle import initialize insert install iterate join list load locate log look make map match merge
    modify move normalize open pack parse perform pop prepare print process produce provide push put query quote raise read
    receive register release reload remove rename replace report reset resolve restore retrieve return reverse run save scan
    search select send serialize set show skip sort split start stop store strip substitute test translate truncate try
    unpack unregister update validate verify wait walk wrap write yield
"""
VERBS = frozenset(_VERBS_TEXT.split())


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


Conversation = tuple[Message, ...]


def conversations(functions: list[Function], rng: Random) -> list[Conversation]:
    """One file's functions as conversations: each alone, in short runs, and one long conversation about the whole file."""
    alone = [_conversation([function], rng) for function in functions]
    documented_twice = [_conversation([function], rng) for function in functions if function.summary]
    runs: list[Conversation] = []
    at = 0
    while at < len(functions):
        turns = rng.randint(TURNS_MIN, TURNS_MAX)
        runs.append(_conversation(functions[at : at + turns], rng, RECALL_SHARE))
        at += turns
    return alone + documented_twice + runs + _long(functions, rng)


def exchange(function: Function, rng: Random) -> tuple[str, str]:
    """(what the user says, what the assistant answers)."""
    asked, answer = _exchange(function, rng)
    return asked if rng.random() < FINAL_NEWLINE_SHARE else asked.rstrip("\n"), answer.rstrip("\n")


def _exchange(function: Function, rng: Random) -> tuple[str, str]:
    code = function.signature + (function.docstring if rng.random() < 0.8 else _short_docstring(function))
    kind = rng.random()
    if function.summary and kind < 0.5:
        return _in_words(function, rng), function.whole
    if kind < 0.65:
        return code, function.body
    if kind < 0.8:
        return f"{rng.choice(ASK_FOR_BODY)}\n\n{code}", function.body
    return f"{rng.choice(ASK_FOR_WHOLE)}\n\n{code}", function.whole


def that_does(summary: str) -> str | None:
    """'Return the sum.' -> 'that returns the sum'; None where the sentence doesn't begin with a verb we know."""
    sentence = summary.split(". ")[0].rstrip(". ")
    first, _, rest = sentence.partition(" ")
    verb = first.lower()
    if not rest or not first.isalpha():
        return None
    if verb in VERBS:
        return f"that {_third_person(verb)} {rest}"
    if verb.endswith("s") and (verb[:-1] in VERBS or verb[:-2] in VERBS or verb[:-3] + "y" in VERBS):
        return f"that {verb} {rest}"
    return None


def _in_words(function: Function, rng: Random) -> str:
    summary = function.summary[:SUMMARY_CHARS_MAX]
    does = that_does(summary)
    opener = rng.choice(OPENERS) if function.owner is None else f"Write a method of the class `{function.owner}`"
    call = f"`{function.name}({function.arguments})`"
    choices = [f"{opener} {call}: {summary}", f"Write {call}. {summary}"]
    if does:
        choices += [f"{opener} {does}.", f"{opener} {call} {does}.", f"{opener} called `{function.name}` {does}."]
    return rng.choice(choices)


def _short_docstring(function: Function) -> str:
    return (
        f'    """{function.summary}"""\n'
        if function.summary and '"' not in function.summary and "\\" not in function.summary
        else function.docstring
    )


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def _conversation(functions: list[Function], rng: Random, recall_share: float = 0.0) -> Conversation:
    """A turn for each function and, now and then, one that asks again for what an earlier turn was about."""
    messages = [Message("system", rng.choice(SYSTEMS))] if rng.random() < SYSTEM_SHARE else []
    for index, function in enumerate(functions):
        asked, answer = exchange(function, rng)
        messages += [Message("user", asked), Message("assistant", answer)]
        if rng.random() < recall_share:
            earlier = rng.choice(functions[: index + 1])
            asked = rng.choice(ASK_AGAIN).format(earlier.name)
            messages += [Message("user", asked), Message("assistant", earlier.whole.rstrip("\n"))]
    return tuple(messages)


def _long(functions: list[Function], rng: Random) -> list[Conversation]:
    """The whole file in conversations as long as the context; nothing where short runs hold it already."""
    if len(functions) <= TURNS_MAX:
        return []
    found: list[Conversation] = []
    batch: list[Function] = []
    chars = 0
    for function in functions:
        batch.append(function)
        chars += len(function.whole) + len(function.docstring) + len(function.signature)
        if chars > LONG_CHARS_MAX:
            found.append(_conversation(batch, rng, RECALL_SHARE))
            batch, chars = [], 0
    return [*found, _conversation(batch, rng, RECALL_SHARE)] if batch else found
