"""The model card: a pure function from what a run measured to Markdown."""

import json
from typing import Any, NamedTuple

from deploy.demo_model import dataset as data
from deploy.demo_model.evaluate import Score

LOG = "training_log.json"


class Run(NamedTuple):
    settings: dict[str, Any]
    device: str
    kept_step: int  # whose weights are the run's result
    log: list[dict[str, float]]  # one row per evaluation


class Facts(NamedTuple):
    parameters: int
    config: dict[str, Any]
    corpus: data.Dataset
    runs: list[Run]  # each but the first from the weights of the one before
    scores: list[Score]  # by kind, as data.KINDS
    by_position: list[tuple[int, float]]
    repeat: tuple[float, float] | None  # loss of a passage, and when it comes again
    samples: list[tuple[str, str]]  # (asked, answered)


def runs_to_json(runs: list[Run]) -> str:
    return json.dumps([run._asdict() for run in runs], indent=1) + "\n"


def runs_from_json(text: str) -> list[Run]:
    return [Run(**run) for run in json.loads(text)]


def text(facts: Facts) -> str:
    return "\n".join([_HEAD, _what(facts), _data(facts), _training(facts), _results(facts), _samples(facts)])


_HEAD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [python, tiny, demo]
---
# penstock-demo

A very small language model, trained from nothing on the source of Python's standard library. It is here so that a cluster started on a
laptop answers with text instead of noise, and so that acceptance rates and the loss of a KV codec have something real to be measured on.
"""


def _what(facts: Facts) -> str:
    config = facts.config
    return f"""\
## What it is

Llama architecture, {facts.parameters / 1e6:.1f} million parameters in bfloat16, {config["num_hidden_layers"]} layers of width {config["hidden_size"]},
{config["num_attention_heads"]} query heads over {config["num_key_value_heads"]} KV heads of {config["head_dim"]}, tied embeddings, a byte-level BPE of
{config["vocab_size"]} tokens, and a context of {config["max_position_embeddings"]} tokens, all of whose positions were trained.

It completes simple Python plausibly, in the standard library's manner: short bodies, accessors, argument checks, file and string
handling. It is often wrong, it does not know what it does not know, and **it does not chat**: a greeting gets Python back. Nothing in it was
tuned for safety. Don't use it for anything but trying out a server.

Three ways to ask:

- source text as a raw completion (`<|bos|>` is put in front by the tokenizer);
- a chat message that is a signature and a docstring, alone or after "Write the body of this function:": the answer is the body,
  indented, so that message and answer are one function;
- a chat message in words ("Write a Python function called `name` that ..."), or "Implement this function:" and a signature: the answer is the
  whole function.

`generation_config.json` asks for sampling at temperature 0.3.
"""


def _data(facts: Facts) -> str:
    corpus = facts.corpus
    lines = []
    for kind, name in enumerate(data.KINDS):
        training, held_out = (corpus.select(held_out=side, kind=kind) for side in (False, True))
        counts = (len(training), corpus.count_tokens(training), len(held_out), corpus.count_tokens(held_out))
        lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return f"""\
## Data and licence

The `.py` files of one CPython {corpus.python} standard library, its own test suite included, and nothing else: {corpus.files:,} files after tables
(`encodings`, `pydoc_data`), duplicates and files that don't parse are left out. That text is under the Python Software Foundation License
Version 2, a copy of which is in `LICENSE.python.txt`; a model this small repeats some of it word for word, and such passages stay under it.
The weights themselves are under this repository's licence.

Whole files are documents. Functions of the library proper (not of its tests) are also taken apart into conversations: the instruction is
the signature with its docstring, or a sentence made from the docstring's first paragraph; the answer is the body, or the whole function. They
appear alone, in runs of 2 to 5 turns, and as one long conversation per file; in the longer ones the user now and then asks for an earlier
function again ("Show me `name` again."), which is answered with a copy. About one file in 20, chosen by a hash of its path, is held
out with all its functions; a function that also occurs in a training file is left out of the held-out conversations.

| text | training documents | training tokens | held-out documents | held-out tokens |
| --- | --- | --- | --- | --- |
{chr(10).join(lines)}
"""


def _training(facts: Facts) -> str:
    corpus_tokens = facts.corpus.count_tokens(facts.corpus.select(held_out=False))
    tokens = sum(_kept_row(run)["tokens"] for run in facts.runs)
    runs = [_run(number, run) for number, run in enumerate(facts.runs, 1)]
    return f"""\
## Training

With `python -m deploy.demo_model.train`, from random weights; what is here has seen {tokens / 1e6:.0f} million tokens,
{tokens / corpus_tokens:.1f} times the training text. The learning rate warms up, is flat, then falls linearly to zero over the last
`decay_share` of a run. After each run the weights of the step with the lowest held-out loss are kept, and a next run starts from them.
In `repeat_share` of the rows one passage, a quarter of the row at most, stands a second time further on, to teach copying.
The training loss is measured with dropout on, so it reads higher than it would without. `{LOG}` has the whole curve.

{chr(10).join(runs)}"""


def _run(number: int, run: Run) -> str:
    last = run.log[-1]
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    return f"""\
Run {number}, on one {run.device}: {last["step"]:,} steps in {last["seconds"] / 60:.1f} minutes, kept: step {run.kept_step:,}.
Settings: {settings}.

| step | million tokens | training loss | held-out library loss | held-out conversation loss |
| --- | --- | --- | --- | --- |
{chr(10).join(_log_line(row) for row in _thinned(run))}
"""


def _kept_row(run: Run) -> dict[str, float]:
    return next(row for row in run.log if row["step"] == run.kept_step)


def _results(facts: Facts) -> str:
    lines = [
        f"| {name} | {score.tokens:,} | {score.loss:.3f} | {score.perplexity:.2f} | {score.bits_per_byte:.3f} |"
        for name, score in zip(data.KINDS, facts.scores, strict=True)
        if score.tokens
    ]
    table = f"""\
## Held-out results

The bfloat16 weights as stored, over all held-out text, in rows of 2,048 tokens. Perplexity is per token of this tokenizer; bits
per byte compare across tokenizers. Part of this text also chose the step that was kept and, of a few
tries, the settings, so the figures flatter a little.

| held-out text | tokens | loss | perplexity | bits per byte |
| --- | --- | --- | --- | --- |
{chr(10).join(lines)}
"""
    return "\n".join([table, *_context(facts)])


def _context(facts: Facts) -> list[str]:
    """What is known of how the model uses its context; nothing where the held-out files are too short to tell."""
    if not facts.by_position:
        return []
    starts = [0, *(end for end, _ in facts.by_position)]
    places = [f"| {start:,} to {end:,} | {loss:.3f} |" for start, (end, loss) in zip(starts, facts.by_position, strict=False)]
    by_position = f"""\
Loss by position, over those held-out files that fill the context (what stands where differs, so read the trend alone):

| positions | loss |
| --- | --- |
{chr(10).join(places)}
"""
    if facts.repeat is None:
        return [by_position]
    first, again = facts.repeat
    copies = _copying(again / first)
    return [
        by_position,
        f"A held-out passage of 1,024 tokens has a loss of {first:.3f}, and {again:.3f} when it comes again at once: {copies}.\n",
    ]


def _copying(share_left: float) -> str:
    if share_left < 0.3:
        return "it copies"
    if share_left < 0.8:
        return "it copies with mistakes, so prompt-lookup speculation has some of its drafts accepted"
    return "it hardly copies, so prompt-lookup speculation finds little to accept here"


def _samples(facts: Facts) -> str:
    shown = [f"Asked:\n\n{_quoted(asked)}\nAnswered:\n\n{_quoted(answered)}" for asked, answered in facts.samples]
    return "## Samples\n\nGreedy, at most 160 tokens, one user message each, neither chosen nor mended.\n\n" + "\n".join(shown)


def _quoted(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def _thinned(run: Run) -> list[dict[str, float]]:
    """About a dozen rows of the log, the kept one and the last among them."""
    stride = max(1, len(run.log) // 10)
    return [row for index, row in enumerate(run.log) if index % stride == 0 or row["step"] == run.kept_step or row is run.log[-1]]


def _log_line(row: dict[str, float]) -> str:
    losses = [row[name] for name in ("training_loss", "held_out_library_loss", "held_out_conversation_loss")]
    return f"| {row['step']:,} | {row['tokens'] / 1e6:.0f} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |"
