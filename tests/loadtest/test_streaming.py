"""One streamed request against servers that do well and badly."""

import pytest

from loadtest.streaming import Answer, connect
from tests.loadtest.fake_server import TOKENS, Behaviour, fake_server


def asked(behaviour: Behaviour, path: str = "/v1/completions") -> Answer:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    answer = Answer()
    with fake_server(lambda number: behaviour) as server, connect(server.url, "") as http:
        answer.stream(http, path, prompt | {"stream": True}, "id-1")
        assert server.bodies[0]["request_id"] == "id-1"
    return answer


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_text_times_usage_and_reason_come_from_the_stream(path: str) -> None:
    answer = asked("fine", path)
    assert (answer.outcome, answer.text, answer.finish_reason, answer.status) == ("ok", "ab" * TOKENS, "length", 200)
    assert len(answer.chunk_s) == TOKENS and answer.chunk_s == sorted(answer.chunk_s) and answer.total_s >= answer.chunk_s[-1] > 0
    assert answer.usage["completion_tokens"] == TOKENS and answer.usage["penstock"]["route"] == "direct"


def test_a_429_is_refused_and_says_when_to_come_back() -> None:
    answer = asked("busy")
    assert (answer.outcome, answer.code, answer.retry_after_s) == ("refused", "overloaded", 1.0)


@pytest.mark.parametrize(
    ("behaviour", "code"), [("broken", "internal_error"), ("torn", "truncated"), ("error_inside", "unavailable")]
)
def test_a_request_that_fails_is_an_error_with_its_code(behaviour: Behaviour, code: str) -> None:
    answer = asked(behaviour)
    assert (answer.outcome, answer.code) == ("error", code)


def test_a_server_that_is_gone_is_a_connection_error() -> None:
    with fake_server() as server:
        url = server.url
    answer = Answer()
    with connect(url, "") as http:
        answer.stream(http, "/v1/completions", {"prompt": "hi", "stream": True}, "id-1")
    assert (answer.outcome, answer.code) == ("error", "connection") and answer.total_s > 0


def test_an_answer_that_is_left_is_cut() -> None:
    assert Answer().outcome == "cut"
