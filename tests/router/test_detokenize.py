"""Streamed text equals the text of all tokens at once."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.router.detokenize import Detokenizer
from services.router.model import Model


def streamed(model: Model, ids: list[int], skipped: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = Detokenizer(lambda some: model.decode(some, skip_special=False), skipped)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_any_text_streams_back_exactly(model: Model, text: str) -> None:
    assert "".join(streamed(model, model.encode(text))) == text


@given(ids=st.lists(st.integers(5, 399), max_size=80))
@settings(deadline=None)
def test_any_tokens_stream_to_what_they_decode_to(model: Model, ids: list[int]) -> None:
    parts = streamed(model, ids)
    assert "".join(parts) == model.decode(ids)


def test_a_character_of_several_tokens_is_shown_whole(model: Model) -> None:
    ids = model.encode("x\U0001f980y")
    assert len(ids) >= 5
    parts = [part for part in streamed(model, ids) if part]
    assert parts == ["x", "\U0001f980", "y"]


def test_bytes_that_never_become_a_character_do_not_hold_text_back_for_ever(model: Model) -> None:
    lead = model.encode("\U0001f980")[0]
    parts = streamed(model, [lead] * 300)
    assert "".join(parts) == "�" * 300
    assert max(map(len, parts)) <= 4


def test_special_tokens_leave_no_trace(model: Model) -> None:
    ids = [model.encode("a")[0], 0, 4, model.encode("b")[0]]
    assert "".join(streamed(model, ids, model.special_ids)) == "ab"


def test_sentencepiece_spaces_survive_streaming() -> None:
    vocab = {"▁Hello": 0, "▁wor": 1, "ld": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x99>": 5, "<0x82>": 6, "▁": 7, "<unk>": 8}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(lambda ids: tokenizer.decode(list(ids)))
    ids = [0, 1, 2, 7, 3, 4, 5, 6, 1]
    parts = [*map(detokenizer.push, ids), detokenizer.flush()]
    assert "".join(parts) == "Hello world \U0001f642 wor"
