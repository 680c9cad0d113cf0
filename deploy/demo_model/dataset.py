"""The tokenised corpus as one file, and the rows a training step is made of.

1. `build` reads the library's folder, trains the tokenizer on the training files, encodes everything; `save` writes it.
2. `load` gives it back; nothing after that reads Python source.
3. `rows` packs documents into rows of a fixed length. A row starts with the start of a document, unless it goes on with one too
   long for the row before; what is cut off a short document at a row's end is left out until another epoch cuts elsewhere.
4. `with_repeats` writes a passage a second time into some rows: unlike the library's own text, that can't be learned by heart.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.demo_model import corpus, phrasing
from deploy.demo_model import tokenizer as wording

LIBRARY, TEST, CHAT = 0, 1, 2
KINDS = ("library source", "test source", "conversations")
REPEAT_TOKENS_MIN = 16


class Dataset(NamedTuple):
    tokens: NDArray[np.uint16]  # all documents laid end to end
    ends: NDArray[np.int64]  # [document] where each ends in `tokens`
    kinds: NDArray[np.uint8]  # [document] LIBRARY, TEST or CHAT
    held_out: NDArray[np.bool_]  # [document]
    text_bytes: NDArray[np.int64]  # [document] UTF-8 bytes of its text, special tokens not counted
    files: int
    python: str  # version of the library the text came from

    def document(self, index: int) -> NDArray[np.uint16]:
        start = int(self.ends[index - 1]) if index else 0
        return self.tokens[start : int(self.ends[index])]

    def select(self, *, held_out: bool, kind: int | None = None) -> list[int]:
        wanted = self.held_out == held_out
        if kind is not None:
            wanted &= self.kinds == kind
        return [int(index) for index in np.flatnonzero(wanted)]

    def count_tokens(self, documents: list[int]) -> int:
        return sum(len(self.document(index)) for index in documents)


def read_library(root: Path) -> list[corpus.Source]:
    """Every usable file under `root`; what isn't UTF-8 is passed over."""
    found = []
    for path in sorted(root.rglob("*.py")):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        item = corpus.source(path.relative_to(root).as_posix(), text)
        if item is not None:
            found.append(item)
    return corpus.without_duplicates(found)


def build(sources: list[corpus.Source], python: str, seed: int) -> tuple[Dataset, Tokenizer]:
    tokenizer = wording.train_tokenizer(item.text for item in sources if not item.is_held_out)
    documents = wording.encode_documents(tokenizer, [item.text for item in sources])
    kinds = [TEST if item.is_test else LIBRARY for item in sources]
    held_out = [item.is_held_out for item in sources]
    text_bytes = [len(item.text.encode()) for item in sources]
    library = [item for item in sources if not item.is_test]
    for path, functions in sorted(corpus.distinct_functions(library).items()):
        chats = phrasing.conversations(functions, Random(f"{seed} {path}"))
        documents += wording.encode_conversations(tokenizer, chats)
        kinds += [CHAT] * len(chats)
        held_out += [corpus.is_held_out(path)] * len(chats)
        text_bytes += [sum(len(message.content.encode()) for message in chat) for chat in chats]
    dataset = Dataset(
        np.concatenate([np.asarray(document, np.uint16) for document in documents]),
        np.cumsum([len(document) for document in documents], dtype=np.int64),
        np.asarray(kinds, np.uint8),
        np.asarray(held_out, np.bool_),
        np.asarray(text_bytes, np.int64),
        len(sources),
        python,
    )
    return dataset, tokenizer


def save(dataset: Dataset, path: Path) -> None:
    arrays = {name: getattr(dataset, name) for name in ("tokens", "ends", "kinds", "held_out", "text_bytes")}
    about = np.frombuffer(json.dumps({"files": dataset.files, "python": dataset.python}).encode(), np.uint8)
    np.savez_compressed(path, about=about, **arrays)


def load(path: Path) -> Dataset:
    with np.load(path, allow_pickle=False) as stored:
        about = json.loads(stored["about"].tobytes())
        return Dataset(stored["tokens"], stored["ends"], stored["kinds"], stored["held_out"], stored["text_bytes"], **about)


def rows(dataset: Dataset, documents: list[int], row_tokens: int, rng: Random) -> Iterator[NDArray[np.uint16]]:
    """The documents, shuffled, in rows of exactly `row_tokens`; what doesn't fill a last row is left out."""
    order = list(documents)
    rng.shuffle(order)
    parts: list[NDArray[np.uint16]] = []
    room = row_tokens
    for index in order:
        rest = dataset.document(index)
        is_long = len(rest) > row_tokens // 2
        while len(rest):
            parts.append(rest[:room])
            rest = rest[room:]
            room -= len(parts[-1])
            if room == 0:
                yield np.concatenate(parts)
                parts, room = [], row_tokens
                if not is_long:
                    break


def forever(dataset: Dataset, documents: list[int], row_tokens: int, rng: Random) -> Iterator[NDArray[np.uint16]]:
    """`rows`, epoch after epoch, each in another order. The documents must fill at least one row."""
    while True:
        yield from rows(dataset, documents, row_tokens, rng)


def with_repeats(packed: Iterator[NDArray[np.uint16]], share: float, rng: Random) -> Iterator[NDArray[np.uint16]]:
    """`share` of the rows with one of their passages, a quarter of the row at most, copied over what stands further on."""
    for row in packed:
        if rng.random() < share:
            length = rng.randint(min(REPEAT_TOKENS_MIN, len(row) // 4), len(row) // 4)
            start = rng.randint(0, len(row) - 2 * length)
            again = rng.randint(start + length, len(row) - length)
            row[again : again + length] = row[start : start + length]
        yield row
