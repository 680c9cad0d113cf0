"""The HTTP API over a real socket: every kind of bad input, and every kind of answer."""

import asyncio
import json
from typing import Any

import pytest

from tests.router.conftest import Stack, StackMaker, make_model_dir
from tests.router.scripted import ScriptedDecode

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

BAD = [
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", "prompt = 5: expected str | array | null, got int"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "prompt = '': expected a text that is not empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "prompt = []: expected at least one token"),
    (COMPLETIONS, {}, 400, "prompt", "prompt = None: expected a string, a list of strings"),
    (COMPLETIONS, {"prompt": [1, 400]}, 400, "prompt", "prompt = 400: expected token ids from 0 to 399"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "prompt = -1: expected token ids from 0 to 399"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "expected a string, a list of strings"),
    (COMPLETIONS, {"prompt": ["a", [1]]}, 400, "prompt", "expected strings only, or lists of token ids only"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "expected a string, a list of strings"),
    (COMPLETIONS, {"prompt": [5] * 600}, 400, "prompt", "prompt has 600 tokens and the model's context is 512"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature", "temperature = -1.0: expected a number from 0 to 100"),
    (
        COMPLETIONS,
        {"prompt": "a", "temperature": "hot"},
        400,
        "temperature",
        "temperature = 'hot': expected float | null, got str",
    ),
    (COMPLETIONS, {"prompt": "a", "n": 17}, 400, "n", "n = 17: expected a number from 1 to 16"),
    (COMPLETIONS, {"prompt": ["a"] * 5, "n": 16}, 400, "n", "n = '5 prompts x 16': expected at most 64 sequences"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens = 0: expected at least 1"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**12}, 400, "max_tokens", "so at most 511 can be generated"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix is not supported"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, 400, "best_of", "best_of is not supported"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo", "echo with logprobs is not supported"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "stream_options", "expected stream = true"),
    (COMPLETIONS, {"prompt": "a", "cache_salt": ""}, 400, "cache_salt", "expected 1 to 1024 characters"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt"}, 404, "model", "model = 'gpt': this router serves 'tiny'"),
    (CHAT, {"messages": []}, 400, "messages", "expected at least one message"),
    (CHAT, {"messages": "hi"}, 400, "messages", "messages = 'hi': expected array | null, got str"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages", "missing required field role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "expected a string or a list of text parts"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content",
        "= 'image_url': expected parts of type 'text'",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools", "tools is not supported"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "response_format is not supported",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3},
        400,
        "top_logprobs",
        "expected logprobs = true",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{1}}"}},
        400,
        "chat_template_kwargs",
        "chat_template_kwargs.chat_template is not supported",
    ),
]


async def test_bad_input_gets_a_clear_error_and_disturbs_nothing(stack: Stack) -> None:
    for path, body, status, param, message in BAD:
        response = await stack.http.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (body, error)
        assert message in error["message"], (message, error["message"])
        assert error["type"] == "invalid_request_error"
    assert not stack.decode.starts
    assert (await stack.complete()).status_code == 200


RAW = [
    (b"{", "the body is not valid JSON"),
    (b"", "the body is not valid JSON"),
    (b"[]", "the body: expected `object`, got `array`"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature = nan: expected a finite number"),
    (b'{"prompt": "a", "top_p": -Infinity}', "top_p = -inf: expected a finite number"),
    (b'{"prompt": "\xff\xfe"}', "not valid UTF-8"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "\\ud800"}', "the body is not valid JSON"),
    (b'{"prompt": ' + b"[" * 100_000, "the body is nested too deeply"),
    (b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}", "seed"),
    (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", "max_tokens"),
    (b'{"prompt": [1' + b"0" * 30 + b"]}", "prompt"),
]


@pytest.mark.parametrize(("data", "message"), RAW)
async def test_bytes_that_are_no_request_are_refused_with_the_reason(stack: Stack, data: bytes, message: str) -> None:
    response = await stack.http.post(COMPLETIONS, content=data)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def test_unknown_paths_and_methods_answer_in_openais_shape(stack: Stack) -> None:
    missing = await stack.http.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = await stack.http.get(COMPLETIONS)
    assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"
    assert wrong.headers["allow"] == "POST"
    other = await stack.http.get("/v1/models/gpt")
    assert other.status_code == 404 and other.json()["error"]["param"] == "model"


async def test_a_body_over_the_limit_is_refused_whether_announced_or_not(start_stack: StackMaker) -> None:
    async with start_stack(body_bytes_max=2048) as stack:
        announced = await stack.http.post(COMPLETIONS, content=b"x" * 4096)

        async def unannounced() -> Any:
            for _ in range(4):
                yield b"x" * 1024

        chunked = await stack.http.post(COMPLETIONS, content=unannounced())
        for response, said in ((announced, "at most 2048"), (chunked, "2048")):
            assert response.status_code == 413, response.text
            assert said in response.json()["error"]["message"]
        assert not stack.decode.starts
        assert (await stack.complete()).status_code == 200


NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n",
    "max_tokens", "min_tokens", "logprobs",
)  # fmt: skip


@pytest.mark.parametrize("value", ["-1000", "NaN", "Infinity", "-Infinity", '"1"', "true", "[1]"])
async def test_no_number_may_be_negative_unbounded_or_of_another_type(stack: Stack, value: str) -> None:
    for name in NUMBERS:
        body = f'{{"prompt": "a", "{name}": {value}}}'
        response = await stack.http.post(COMPLETIONS, content=body.encode())
        assert response.status_code == 400, (body, response.text)
        error = response.json()["error"]
        assert error["param"] == name and name in error["message"], (body, error)
        assert error["type"] == "invalid_request_error"
    assert not stack.decode.starts
    assert (await stack.complete()).status_code == 200


async def test_prompts_come_as_text_ids_and_lists_of_both(stack: Stack) -> None:
    for prompt, count in (("ab", 1), (["ab", "cd"], 2), ([70, 71], 1), ([[70, 71], [72]], 2)):
        answer = (await stack.complete(prompt=prompt)).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert {choice["text"] for choice in answer["choices"]} == {"bcd"}
    assert [list(start.token_ids) for start in stack.decode.starts[-2:]] == [[70, 71], [72]]


async def test_n_choices_have_seeds_of_their_own_and_one_prompt_in_usage(stack: Stack) -> None:
    answer = (await stack.complete(prompt=[70, 71], n=3, seed=5)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 2 and answer["usage"]["completion_tokens"] == 9
    seeds = [start.sampling.seed for start in stack.decode.starts]
    assert seeds[0] == 5 and len(set(seeds)) == 3


async def test_a_seed_the_client_left_out_differs_every_time(stack: Stack) -> None:
    for _ in range(3):
        await stack.complete()
    assert len({start.sampling.seed for start in stack.decode.starts}) == 3


async def test_echo_returns_the_prompt_with_or_without_an_answer(stack: Stack) -> None:
    assert (await stack.complete(prompt="ab ", echo=True)).json()["choices"][0]["text"] == "ab bcd"
    only = (await stack.complete(prompt="ab ", echo=True, max_tokens=0)).json()
    assert only["choices"][0]["text"] == "ab " and only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0
    assert len(stack.decode.starts) == 1


async def test_return_token_ids_gives_prompt_and_output_ids(stack: Stack) -> None:
    choice = (await stack.complete(prompt=[80, 81], return_token_ids=True)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [80, 81] and choice["token_ids"] == [70, 71, 72]
    chat = (await stack.chat(return_token_ids=True)).json()
    assert chat["prompt_token_ids"] and chat["choices"][0]["token_ids"] == [70, 71, 72]


async def test_cached_tokens_are_what_decode_reports(stack: Stack) -> None:
    stack.decode.cached_tokens = 48
    usage = (await stack.complete()).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 48}


async def test_a_stop_string_cuts_the_text_and_cancels_the_rest(stack: Stack) -> None:
    stack.decode.tokens = tuple(range(70, 90))  # "bcdefghij..."
    endless = asyncio.Event()
    plain = stack.decode.plain

    async def then_wait(start: Any) -> Any:
        async for step in plain(start):
            step.finish = ""
            yield step
        await endless.wait()

    stack.decode.script = then_wait
    choice = (await stack.complete(stop=["ef", "zz"])).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("bcd", "stop", "ef")
    assert await stack.decode.cancelled.get() == stack.decode.starts[0].request_id


async def test_a_stop_token_is_counted_but_not_shown(stack: Stack) -> None:
    stack.decode.stop_token = 72
    answer = (await stack.complete(stop_token_ids=[72])).json()
    assert answer["choices"][0]["text"] == "bc" and answer["choices"][0]["stop_reason"] == 72
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_stream_holds_back_what_may_become_a_stop_string(stack: Stack) -> None:
    stack.decode.tokens = tuple(range(70, 76))
    text = (await stack.complete(stream=True, stop="dX")).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["b", "c", "de", "f", "g"]
    assert text.endswith("data: [DONE]\n\n")


async def test_usage_comes_in_streams_only_when_asked(stack: Stack) -> None:
    def chunks(text: str) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]

    silent = chunks((await stack.complete(stream=True)).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in silent)
    asked = chunks((await stack.complete(stream=True, stream_options={"include_usage": True})).text)
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in asked[:-1])
    always = {"include_usage": True, "continuous_usage_stats": True}
    running = chunks((await stack.chat(stream=True, stream_options=always)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in running] == [1, 2, 3, 3]


async def test_content_parts_and_strings_make_the_same_chat(stack: Stack) -> None:
    await stack.chat(messages=[{"role": "user", "content": "hello"}])
    await stack.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}])
    one, two = stack.decode.starts
    assert one.token_ids == two.token_ids


async def test_a_model_without_a_chat_template_says_so(start_stack: StackMaker, tmp_path: Any) -> None:
    async with start_stack(directory=make_model_dir(tmp_path / "plain", chat=False)) as stack:
        response = await stack.chat()
        assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]


async def test_defaults_differ_between_completions_and_chat(stack: Stack) -> None:
    await stack.complete(prompt=[70] * 10)
    await stack.chat()
    await stack.chat(max_tokens=5, max_completion_tokens=7)
    first, second, third = stack.decode.starts
    assert first.sampling.max_tokens == 16
    assert second.sampling.max_tokens == 512 - len(second.token_ids)
    assert third.sampling.max_tokens == 7


async def test_request_ids_are_taken_over_and_strange_ones_replaced(stack: Stack) -> None:
    given = await stack.http.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    long = await stack.http.get("/health", headers={"x-request-id": "a" * 500})
    assert len(long.headers["x-request-id"]) == 32
    answer = await stack.http.post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "abc-2"})
    assert answer.json()["id"] == "cmpl-abc-2"


async def test_two_requests_may_share_an_id(stack: Stack) -> None:
    both = await asyncio.gather(
        *(stack.http.post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "x"}) for _ in "ab")
    )
    assert [response.status_code for response in both] == [200, 200]


async def test_keys_are_asked_for_where_they_are_set(start_stack: StackMaker) -> None:
    async with start_stack(keys=("alpha", "beta")) as stack:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic alpha"}):
            response = await stack.http.post(COMPLETIONS, json={"prompt": "a"}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        for key in ("alpha", "beta"):
            response = await stack.http.post(COMPLETIONS, json={"prompt": "a"}, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
        assert (await stack.http.get("/health")).status_code == 200
        assert (await stack.http.get("/v1/models")).status_code == 401


async def test_models_and_metrics_read_as_vllms(stack: Stack) -> None:
    card = (await stack.http.get("/v1/models")).json()["data"][0]
    assert card["id"] == "tiny" and card["root"].endswith("tiny") and card["max_model_len"] == 512
    assert (await stack.http.get("/v1/models/tiny")).json() == card
    stack.decode.cached_tokens = 16
    await stack.complete(prompt=[70] * 40)
    text = (await stack.http.get("/metrics")).text
    for line in (
        'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'vllm:inter_token_latency_seconds_count{model_name="tiny"}',
        'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:prompt_tokens_total{model_name="tiny"} 40.0',
        'vllm:generation_tokens_total{model_name="tiny"} 3.0',
        'vllm:prefix_cache_hits_total{model_name="tiny"} 16.0',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
        'penstock:routes_total{model_name="tiny",plan="recompute"} 1.0',
        'penstock:peers{model_name="tiny",role="decode"} 1.0',
    ):
        assert line in text, line


async def test_ready_says_why_not_and_health_does_not_care(start_stack: StackMaker) -> None:
    async with start_stack(decodes=0, decode=("127.0.0.1:1",)) as stack:
        ready = await stack.http.get("/ready")
        assert ready.status_code == 503 and "no decode worker is connected" in ready.json()["reason"]
        assert (await stack.http.get("/health")).status_code == 200
        refused = await stack.complete()
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"


async def test_ready_waits_for_a_kvstore_unless_told_otherwise(start_stack: StackMaker) -> None:
    async with start_stack(stores=1) as stack:
        assert (await stack.http.get("/ready")).json() == {"ready": True}
    async with (
        ScriptedDecode("d").running() as worker,
        start_stack(decodes=0, decode=(worker.address,), ready_needs_kvstore=True) as stack,
    ):
        while "no kvstore" not in (await stack.http.get("/ready")).json()["reason"]:
            await stack.router._generator.cluster.changed()


async def test_a_worker_of_another_model_is_not_used_and_named(start_stack: StackMaker) -> None:
    async with ScriptedDecode("d", model="other").running() as worker, start_stack(decodes=0, decode=(worker.address,)) as stack:
        while "it serves 'other', not 'tiny'" not in (await stack.http.get("/ready")).json()["reason"]:
            await stack.router._generator.cluster.changed()
        members = (await stack.http.get("/v1/penstock/status")).json()["members"]
        assert members[0]["connected"] and not members[0]["usable"]
