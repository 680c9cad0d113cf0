"""The demo model as it lies in the repository, and the pure parts of how it was made."""

import ast
import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo_model import card, corpus, dataset, phrasing
from deploy.demo_model import tokenizer as wording
from deploy.demo_model.plan import parse
from services.cli.settings import DEMO_MODEL

EXAMPLE = '''\
"""An example."""
import os


@cached
def greet(name, *, loud=False):
    """Return a greeting for name.

    Loud greetings are in capitals.
    """

    # a comment that belongs to the body
    text = f"hello {name}"
    return text.upper() if loud else text


class Stack:
    def push(self, item):
        self.items.append(item)

    def abstract(self):
        """Nothing but a docstring."""

    def peek(self): return self.items[-1]
'''
SIGNATURES = (
    'def get_name(self):\n    """Return the name."""',
    'def is_empty(self):\n    """Return True if the queue is empty."""',
    'def add(a, b):\n    """Return the sum of a and b."""',
    'def set_timeout(self, timeout):\n    """Set the timeout."""',
    'def __len__(self):\n    """Return the number of items."""',
)
CHAT = (
    phrasing.Message("system", "Be short."),
    phrasing.Message("user", "def f(x):"),
    phrasing.Message("assistant", "    return x"),
    phrasing.Message("user", "and g?\n"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def answer(model: Any, tokenizer: Any, prompt: str, tokens_max: int = 120) -> tuple[list[int], str]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, max_new_tokens=tokens_max, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return made, tokenizer.decode(made, skip_special_tokens=True)


def test_the_directory_takes_at_most_24_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= 24e6


def test_it_is_a_bfloat16_llama_of_8_to_12_million_parameters_with_grouped_queries_and_a_long_context(model: Any) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert 8e6 <= sum(one.numel() for one in model.parameters()) <= 12e6
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["max_position_embeddings"] >= 4096


def test_the_stored_tokenizer_and_template_are_those_the_script_writes(tokenizer: Any) -> None:
    assert (DEMO_MODEL / "chat_template.jinja").read_text() == wording.CHAT_TEMPLATE
    assert tokenizer.convert_ids_to_tokens(range(len(wording.SPECIALS))) == list(wording.SPECIALS)
    assert len(tokenizer) == wording.VOCABULARY


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "\tπ ≈ 3.14159\r\n", "  two  spaces  ", "日本語 🙂", "\x00\x7f"])
def test_any_text_comes_back_from_the_tokenizer_as_it_was(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_raw_prompt_begins_a_document(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x = 1"))[0] == wording.BOS


def test_the_chat_template_renders_what_was_trained_on(tokenizer: Any) -> None:
    messages = [message._asdict() for message in CHAT]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == wording.rendered(CHAT)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == wording.rendered(CHAT) + wording.ASSISTANT


def test_the_chat_template_joins_text_parts_and_refuses_other_parts_and_roles(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "def "}, {"type": "text", "text": "f():"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert rendered == "<|bos|><|user|>def f():<|end|>"
    with pytest.raises(Exception, match="must be of type text, not image_url"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image_url"}]}], tokenize=False)
    with pytest.raises(Exception, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_asked_with_signatures_it_mostly_writes_bodies_that_parse_and_stops_by_itself(model: Any, tokenizer: Any) -> None:
    good = 0
    for code in SIGNATURES:
        tokens, text = answer(model, tokenizer, code)
        assert text.isascii()
        good += tokens[-1] == wording.SPECIALS.index(wording.END) and parses_as_function(f"{code}\n{text}\n")
    assert good > len(SIGNATURES) // 2


def parses_as_function(text: str) -> bool:
    try:
        return isinstance(ast.parse(text).body[0], ast.FunctionDef)
    except SyntaxError:
        return False


def test_asked_in_words_it_writes_a_function_of_that_name(model: Any, tokenizer: Any) -> None:
    _, text = answer(model, tokenizer, "Write a Python function `get_size(self)` that returns the size.")
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "get_size"


def test_a_file_it_never_saw_is_far_likelier_than_chance_and_likelier_with_its_far_context(model: Any, tokenizer: Any) -> None:
    path = Path(ast.__file__)
    assert corpus.is_held_out(path.name)
    tokens = tokenizer.encode(path.read_text())[:4096]
    in_context = float(losses_of(model, tokens)[-512:].mean())
    alone = float(losses_of(model, [tokens[0], *tokens[-513:]])[-512:].mean())
    assert in_context < alone < 0.6 * float(np.log(wording.VOCABULARY))


def losses_of(model: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


def test_the_model_card_says_data_licence_steps_loss_and_perplexity() -> None:
    text = (DEMO_MODEL / "README.md").read_text()
    runs = card.runs_from_json((DEMO_MODEL / card.LOG).read_text())
    for needed in ("standard library", "Python Software Foundation License", "perplexity", "held-out", "does not chat"):
        assert needed in text
    for run in runs:
        assert f"kept: step {run.kept_step:,}" in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DEMO_MODEL / "LICENSE.python.txt").read_text().upper()


def test_a_function_is_taken_apart_into_signature_docstring_and_body() -> None:
    greet, push = corpus.functions(EXAMPLE)
    assert greet.signature == "def greet(name, *, loud=False):\n"
    assert greet.summary == "Return a greeting for name."
    assert greet.body.startswith("    # a comment that belongs to the body\n    text = ")
    assert ast.dump(ast.parse(greet.whole)) != ast.dump(ast.parse(greet.signature + greet.docstring + greet.body))
    assert push == corpus.Function(
        "push", "Stack", "self, item", "def push(self, item):\n", "", "", "    self.items.append(item)\n"
    )


def test_functions_that_cannot_be_cut_at_line_ends_are_left_out() -> None:
    assert [function.name for function in corpus.functions(EXAMPLE)] == ["greet", "push"]
    assert corpus.functions('class A:\n    def f(self):\n        return """\nflush left"""\n') == []


@pytest.mark.parametrize("path", [Path(corpus.__file__), Path(phrasing.__file__), Path(json.__file__), Path(ast.__file__)])
def test_every_request_for_a_body_with_its_answer_is_the_function(path: Path) -> None:
    rng = Random(0)
    for function in corpus.functions(path.read_text()):
        asked, replied = phrasing.exchange(function, rng)
        if replied.startswith("    "):
            code = asked[asked.index(function.signature.rstrip()) :]
            parsed = ast.parse(f"{code.rstrip()}\n{replied}\n").body[0]
        else:
            parsed = ast.parse(replied).body[0]
        assert isinstance(parsed, ast.FunctionDef | ast.AsyncFunctionDef)
        assert parsed.name == function.name


def test_long_files_make_one_long_conversation_and_every_function_appears_in_it() -> None:
    functions = corpus.functions(Path(ast.__file__).read_text())
    chats = phrasing.conversations(functions, Random(0))
    longest = max(chats, key=len)
    assert len(longest) > 2 * phrasing.TURNS_MAX + 1
    for chat in chats:
        roles = [message.role for message in chat if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_asked_for_an_earlier_function_again_the_answer_is_that_function() -> None:
    functions = corpus.functions(Path(ast.__file__).read_text())
    whole = {function.whole.rstrip() for function in functions}
    longest = max(phrasing.conversations(functions, Random(0)), key=len)
    again = tuple(text.split("{}")[0] for text in phrasing.ASK_AGAIN)
    recalls = [reply.content for asked, reply in pairwise(longest) if asked.role == "user" and asked.content.startswith(again)]
    assert recalls
    assert whole.issuperset(recalls)


@pytest.mark.parametrize(
    ("summary", "clause"),
    [
        ("Return the sum. Both are integers.", "that returns the sum"),
        ("Returns the sum.", "that returns the sum"),
        ("Copy a file", "that copies a file"),
        ("Push x on the stack.", "that pushes x on the stack"),
        ("Helper for main.", None),
        ("Return", None),
    ],
)
def test_a_docstring_becomes_a_clause_where_it_begins_with_a_known_verb(summary: str, clause: str | None) -> None:
    assert phrasing.that_does(summary) == clause


def test_tables_foreign_text_and_what_is_no_python_are_no_corpus() -> None:
    code = "x = 1\n" * 100
    assert corpus.source("a.py", code) is not None
    assert corpus.source("encodings/cp437.py", code) is None
    assert corpus.source("a.py", "print 'two'\n" * 100) is None
    assert corpus.source("a.py", "# 日本語\n" * 100) is None
    assert corpus.source("a.py", "x = 1\n") is None
    assert getattr(corpus.source("test/test_a.py", code), "is_test", None) is True


def test_what_training_files_hold_is_not_held_out_too() -> None:
    held = next(f"m{n}.py" for n in range(1000) if corpus.is_held_out(f"m{n}.py"))
    kept = next(f"m{n}.py" for n in range(1000) if not corpus.is_held_out(f"m{n}.py"))
    files = [corpus.Source(held, EXAMPLE, False, True), corpus.Source(kept, EXAMPLE, False, False)]
    assert [item.path for item in corpus.without_duplicates(files)] == [kept]
    assert list(corpus.distinct_functions(files)) == [kept]


def tokens_of(lengths: list[int]) -> dataset.Dataset:
    """Documents 0, 1, ...; every token of a document is its number."""
    count = len(lengths)
    return dataset.Dataset(
        np.repeat(np.arange(count), lengths).astype(np.uint16),
        np.cumsum(lengths, dtype=np.int64),
        np.zeros(count, np.uint8),
        np.zeros(count, np.bool_),
        np.asarray(lengths, np.int64),
        count,
        "3",
    )


def test_rows_are_full_and_a_long_document_goes_on_in_the_next_row() -> None:
    data = tokens_of([100, 3, 3, 3, 7, 2])
    rows = list(dataset.rows(data, list(range(6)), 10, Random(0)))
    assert {len(row) for row in rows} == {10}
    assert sum(int((row == 0).sum()) for row in rows) >= 90
    for row in rows:
        for document in (1, 2, 3, 5):
            assert int((row == document).sum()) <= len(data.document(document))


def test_a_row_with_a_repeat_holds_one_of_its_passages_twice_and_keeps_its_length() -> None:
    rng = Random(0)
    for _ in range(200):
        row = np.arange(64, dtype=np.uint16)
        (made,) = dataset.with_repeats(iter([row.copy()]), 1.0, rng)
        changed = np.flatnonzero(made != row)
        assert len(made) == 64 and len(changed) == dataset.REPEAT_TOKENS_MIN
        assert np.array_equal(np.diff(made[changed]), np.ones(len(changed) - 1))
        assert int(made[changed[-1]]) < int(changed[0])


def test_rows_stay_as_they_are_where_no_repeats_are_asked_for() -> None:
    row = np.arange(64, dtype=np.uint16)
    assert np.array_equal(next(dataset.with_repeats(iter([row.copy()]), 0.0, Random(0))), row)


def test_a_dataset_comes_back_from_its_file(tmp_path: Path) -> None:
    data = tokens_of([3, 4])
    dataset.save(data, tmp_path / "corpus.npz")
    again = dataset.load(tmp_path / "corpus.npz")
    assert all(np.array_equal(one, other) for one, other in zip(data, again, strict=True))
    assert again.select(held_out=False, kind=dataset.LIBRARY) == [0, 1]


def test_arguments_that_do_not_fit_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", ["--out", "x", "--tokens-per-step", "1000"])
    assert "--tokens-per-step 1000 is not a multiple" in capsys.readouterr().err
    assert parse("", ["--out", "x", "--device", "cpu"]).optimiser == "adamw"
