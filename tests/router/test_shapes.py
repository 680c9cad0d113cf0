"""Responses byte by byte."""

from common.errors import ContextExceeded, Overloaded
from common.generation import FinishReason, Token
from services.router.choice import Delta
from services.router.model import Model
from services.router.shapes import ChatShape, CompletionShape, Head, Wanted, error_body, event, merge, usage

HEAD = Head("cmpl-1", 1700000000, "tiny")
FIRST = Delta(0, "b", (Token(70, -0.5, ((70, -0.5), (71, -1.5))),))
LAST = Delta(0, "c", (Token(71, float("-inf")),), FinishReason.STOP, "END")


def test_a_completion_chunk_is_written_as_openai_does(model: Model) -> None:
    shape = CompletionShape(HEAD, model, Wanted(), [[5]], 1)
    assert event(shape.chunk(FIRST, True)) == (
        b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"tiny","choices":[{"index":0,"text":"b",'
        b'"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
    )


def test_a_chat_chunk_names_the_role_once(model: Model) -> None:
    shape = ChatShape(HEAD, model, Wanted(), [[5]])
    assert event(shape.chunk(FIRST, True)) == (
        b'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"tiny","choices":[{"index":0,'
        b'"delta":{"role":"assistant","content":"b"},"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
    )
    assert event(shape.chunk(LAST, False)) == (
        b'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"tiny","choices":[{"index":0,'
        b'"delta":{"content":"c"},"logprobs":null,"finish_reason":"stop","stop_reason":"END"}]}\n\n'
    )


def test_token_ids_are_where_vllm_puts_them(model: Model) -> None:
    wanted = Wanted(token_ids=True)
    completion = CompletionShape(HEAD, model, wanted, [[5, 6]], 1)
    assert completion.chunk(FIRST, True)["choices"][0]["prompt_token_ids"] == [5, 6]
    assert completion.chunk(FIRST, True)["choices"][0]["token_ids"] == [70]
    assert "prompt_token_ids" not in completion.chunk(LAST, False)["choices"][0]
    chat = ChatShape(HEAD, model, wanted, [[5, 6]])
    assert chat.full([merge([FIRST, LAST])])["prompt_token_ids"] == [5, 6]
    assert chat.full([merge([FIRST, LAST])])["choices"][0]["token_ids"] == [70, 71]


def test_completion_logprobs_go_on_counting_offsets(model: Model) -> None:
    shape = CompletionShape(HEAD, model, Wanted(logprobs=2), [[5]], 1)
    assert shape.chunk(FIRST, True)["choices"][0]["logprobs"] == {
        "tokens": ["b"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"b": -0.5, "c": -1.5}],
        "text_offset": [0],
    }
    assert shape.chunk(LAST, False)["choices"][0]["logprobs"] == {
        "tokens": ["c"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"c": -9999.0}],
        "text_offset": [1],
    }


def test_chat_logprobs_carry_bytes(model: Model) -> None:
    shape = ChatShape(HEAD, model, Wanted(logprobs=1), [[5]])
    assert shape.full([FIRST])["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "b",
                "logprob": -0.5,
                "bytes": [98],
                "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


def test_a_token_that_is_part_of_a_character_shows_its_own_bytes(model: Model) -> None:
    first, *_ = model.encode("\U0001f980")
    assert model.token_bytes(first) == [0xF0]


def test_usage_counts_cached_tokens() -> None:
    assert usage(10, 3, 8) == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


def test_errors_are_openai_shaped_and_a_bug_tells_nothing_of_itself() -> None:
    assert error_body(ContextExceeded("too long", param="prompt")) == {
        "error": {"message": "too long", "type": "invalid_request_error", "param": "prompt", "code": "context_length_exceeded"}
    }
    assert error_body(Overloaded("full"))["error"]["type"] == "rate_limit_error"
    assert "secret" not in error_body(RuntimeError("secret"))["error"]["message"]
