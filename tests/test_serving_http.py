"""The server as OpenAI's clients see it: shapes, streams, and the tokens of ``generate``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="mlakit[serve] is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

from mlakit.generation import generate  # noqa: E402
from serving_http import (  # noqa: E402
    CYCLE,
    Running,
    cycling_model,
    running,
    small_model,
    tokenizer_with,
)

TOKENIZER = tokenizer_with()
PROMPTS = ["a", "hello there", "", "one two three four", "grüße €"]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Running]:
    with running(model, TOKENIZER, block_size=16, prefill_chunk=8) as found:
        yield found


def written(model: Any, prompts: list[str], count: int, **options: Any) -> list[str]:
    return generate(model, TOKENIZER, prompts, max_new_tokens=count, **options).texts


def test_completions_are_what_generate_writes(server: Running, model: Any) -> None:
    expected = written(model, PROMPTS, 12)
    ids = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    ask = server.openai.completions.create
    for prompt in (PROMPTS, ids):
        answer = ask(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(PROMPTS)))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 12 * len(PROMPTS)
    for prompt in (PROMPTS[1], ids[1]):
        single = ask(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in single.choices] == expected[1:2]
        assert single.choices[0].finish_reason == "length"
    assert len(ask(model="tiny", prompt="a", temperature=0).choices[0].text.encode()) >= 16


def test_a_seed_decides_the_text(server: Running, model: Any) -> None:
    how: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    asked: dict[str, Any] = {**how, "extra_body": {"top_k": 40}, "max_tokens": 12}
    for seed in (3, 4):
        expected = written(model, ["hello"], 12, seed=seed, top_k=40, **how)
        answer = server.openai.completions.create(model="tiny", prompt="hello", seed=seed, **asked)
        assert [answer.choices[0].text] == expected
    both = server.openai.completions.create(model="tiny", prompt="hello", seed=3, n=2, **asked)
    assert [choice.text for choice in both.choices] == [
        written(model, ["hello"], 12, seed=seed, top_k=40, **how)[0] for seed in (3, 4)
    ]
    loose = [
        server.openai.completions.create(model="tiny", prompt="hello", max_tokens=12)
        for _ in range(2)
    ]
    assert loose[0].choices[0].text != loose[1].choices[0].text


def test_many_at_once_are_not_mixed(server: Running, model: Any) -> None:
    prompts = [f"story number {number}:" for number in range(24)]
    expected = written(model, prompts, 20, temperature=0.7, seed=5)

    async def one(client: Any, place: int) -> str:
        options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.7, "seed": 5}
        if place % 2:
            answer = await client.completions.create(model="tiny", prompt=prompts[place], **options)
            return answer.choices[0].text
        stream = await client.completions.create(
            model="tiny", prompt=prompts[place], stream=True, **options
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with server.openai_async as client:
            return await asyncio.gather(*(one(client, place) for place in range(24)))

    assert asyncio.run(all_of_them()) == expected


def test_chat(server: Running, model: Any) -> None:
    expected = generate(model, TOKENIZER, ["hello"], max_new_tokens=12, chat=True).texts[0]
    ask = server.openai.chat.completions.create
    options: dict[str, Any] = {"model": "tiny", "temperature": 0}
    user = {"role": "user", "content": "hello"}
    answer = ask(messages=[user], max_completion_tokens=12, **options)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected)
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert ask(messages=[parts], max_tokens=12, **options).choices[0].message.content == expected
    stream = ask(
        messages=[user],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    options["extra_body"] = {"ignore_eos": True}
    whole = ask(messages=[user], **options)  # no number: as many as fit
    assert whole.usage is not None and whole.usage.total_tokens == 256


def test_streams_are_server_sent_events(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 6, "temperature": 0, "stream": True, "n": 2}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"].startswith("req-")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks[0]
    for index in (0, 1):
        ends = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [end["finish_reason"] for end in ends] == [None] * (len(ends) - 1) + ["length"]


def test_characters_stay_whole(server: Running) -> None:
    tokenizer = tokenizer_with()
    with running(cycling_model(tokenizer), tokenizer) as other:
        ask = other.openai.completions.create
        options: dict[str, Any] = {"model": "tiny", "prompt": "é", "temperature": 0}
        assert ask(max_tokens=36, **options).choices[0].text == 3 * CYCLE
        chunks = [c.choices[0] for c in ask(max_tokens=36, stream=True, **options)]
        assert [c.text for c in chunks if c.text] == list(3 * CYCLE)
        talk = other.openai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "é"}],
            temperature=0,
            max_tokens=24,
            stream=True,
            logit_bias={str(tokenizer("é")["input_ids"][-1]): 0.5},
        )
        assert "\ufffd" not in "".join(c.choices[0].delta.content or "" for c in talk)
        cut = ask(max_tokens=24, stop="界é", **options).choices[0]
        assert (cut.text, cut.finish_reason) == ("😀世", "stop")
        scored = ask(max_tokens=12, logprobs=1, **options).choices[0].logprobs
        assert scored is not None and scored.tokens is not None
        assert scored.tokens[0] == "bytes:\\xf0"
        assert scored.text_offset == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2


def test_log_probabilities_in_both_shapes(server: Running) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    ask = server.openai.completions.create
    whole = ask(prompt="hello", logprobs=3, **options).choices[0].logprobs
    assert whole is not None and whole.top_logprobs is not None and whole.tokens is not None
    assert len(whole.tokens) == len(whole.token_logprobs or ()) == len(whole.text_offset or ()) == 8
    for token, logprob, top in zip(whole.tokens, whole.token_logprobs or (), whole.top_logprobs):
        assert top[token] == logprob == max(top.values()) <= 0  # greedy: the likeliest
        assert len(top) == 3
    pieces = [
        c.choices[0].logprobs for c in ask(prompt="hello", logprobs=3, stream=True, **options)
    ]
    assert [x for piece in pieces for x in piece.tokens] == whole.tokens
    assert [x for piece in pieces for x in piece.text_offset] == whole.text_offset
    plain = ask(prompt="hello", logprobs=0, **options).choices[0].logprobs
    assert plain is not None and plain.top_logprobs is None and plain.tokens == whole.tokens
    assert ask(prompt="hello", **options).choices[0].logprobs is None

    talk = server.openai.chat.completions.create
    user: Any = [{"role": "user", "content": "hello"}]
    answer = talk(messages=user, logprobs=True, top_logprobs=2, **options).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    spelled = b"".join(bytes(entry.bytes or ()) for entry in answer.logprobs.content)
    assert spelled.decode(errors="replace") == answer.message.content
    for entry in answer.logprobs.content:
        assert [entry.logprob, len(entry.top_logprobs)] == [entry.top_logprobs[0].logprob, 2]
    bare = talk(messages=user, logprobs=True, **options).choices[0].logprobs
    assert bare is not None and bare.content is not None
    assert [entry.top_logprobs for entry in bare.content] == [[]] * 8


def test_stop_echo_and_penalties(server: Running, model: Any) -> None:
    text = written(model, ["hello"], 24)[0]
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 24, "temperature": 0}
    stop = text[5:7]
    answer = server.post("/v1/completions", stop=[stop, "nothing"], **options).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    echoed = server.post("/v1/completions", echo=True, **options).json()
    assert echoed["choices"][0]["text"] == "hello" + text
    ids = TOKENIZER("hello")["input_ids"]
    echoed = server.post("/v1/completions", **{**options, "prompt": ids, "echo": True}).json()
    assert echoed["choices"][0]["text"] == "hello" + text
    never = TOKENIZER("x")["input_ids"][1]
    biased = server.post("/v1/completions", logit_bias={str(never): 100}, **options).json()
    assert biased["choices"][0]["text"] == "x" * 24
    tired = server.post(
        "/v1/completions", logit_bias={str(never): 100}, frequency_penalty=2, seed=1, **options
    ).json()
    assert tired["choices"][0]["text"].startswith("x")


def test_models_and_pages(server: Running) -> None:
    assert [entry.id for entry in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").model_dump()["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("org/other")
    assert server.http.get("/health").json() == {"status": "ok"}
    assert "tiny" in server.http.get("/").text
    own = server.http.get("/v1/models", headers={"X-Request-Id": "my-id"})
    assert own.headers["x-request-id"] == "my-id"


def test_figures_count_what_was_done(server: Running) -> None:
    before = server.figures()
    body = {"prompt": "one page of sixteen tokens", "max_tokens": 5, "temperature": 0}
    for _ in range(2):
        answer = server.post("/v1/completions", ignore_eos=True, **body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
    server.refused("/v1/completions", prompt=None)
    after = server.figures()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained['mlakit_http_requests_total{path="/v1/completions",status="200"}'] == 2
    assert gained['mlakit_http_requests_total{path="/v1/completions",status="400"}'] == 1
    assert gained['mlakit_sequences_finished_total{reason="length"}'] == 2
    assert gained["mlakit_prompt_tokens_total"] == 2 * 27
    assert gained["mlakit_cached_prompt_tokens_total"] == 16
    assert gained["mlakit_completion_tokens_total"] == 10
    assert gained["mlakit_first_token_seconds_count"] == 2
    assert gained["mlakit_per_token_seconds_count"] == 2
    assert gained["mlakit_prefix_pages_found_total"] == 1
    assert after["mlakit_requests_running"] == after["mlakit_requests_waiting"] == 0


def test_what_one_choice_computes_is_not_found_for_another() -> None:
    """``cached_tokens`` is of the prompt, which several choices share."""
    with running(small_model(), TOKENIZER, block_size=16) as server:
        body = {"prompt": "one page of sixteen tokens", "max_tokens": 3, "n": 4}
        for found in (0, 16):
            usage = server.post("/v1/completions", **body).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == found
