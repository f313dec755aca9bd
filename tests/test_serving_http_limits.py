"""What the server refuses, what it survives, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="mlakit[serve] is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

from serving_http import (  # noqa: E402
    Running,
    running,
    small_model,
    tokenizer_with,
    wait_until,
)

TOKENIZER = tokenizer_with()
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hello"}]
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
"""Minutes of work."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options: dict[str, Any] = {"max_batch_size": 4, "cache_bytes": 2**26}
    with running(small_model(2**20), TOKENIZER, body=4000, max_waiting=3, **options) as found:
        yield found


@pytest.mark.parametrize(
    "field,value",
    [
        ("suffix", "x"),
        ("best_of", 2),
        ("min_p", 0.1),
        ("guided_json", {}),
        ("response_format", {"type": "json_object"}),
        ("regex", "a+"),
        ("allowed_token_ids", [1]),
        ("stream_options", {"include_usage": True}),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [-1]),
        ("prompt", [300]),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 2**21),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("top_p", 1.1),
        ("n", 0),
        ("n", 99),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("logprobs", 6),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"300": 1}),
        ("presence_penalty", 3),
        ("seed", 2**63),
        ("seed", 10**300),
    ],
)
def test_a_bad_completion_names_the_field(server: Running, field: str, value: Any) -> None:
    status, error = server.refused(PLAIN, **{"prompt": "a", field: value})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] in (field, None) and (field in error["message"] or value == [300])


@pytest.mark.parametrize(
    "field,value",
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("top_logprobs", 2),
        ("logprobs", 2),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "nobody", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
    ],
)
def test_a_bad_conversation_names_the_field(server: Running, field: str, value: Any) -> None:
    status, error = server.refused(CHAT, **{"messages": USER, field: value})
    assert (status, error["param"].split(".")[0]) == (400, "logprobs" if "log" in field else field)


def test_harmless_values_and_unknown_fields_are_taken(server: Running) -> None:
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    none = dict.fromkeys(("stop", "seed", "temperature", "n", "logprobs", "stream_options"))
    other = {"user": "u", "service_tier": "auto", "nobody_knows": 1, "model": "tiny"}
    body = {**harmless, **none, **other, "messages": USER, "max_tokens": 1}
    assert server.post(CHAT, **body).status_code == 200


def test_a_template_s_own_words_reach_the_client(server: Running) -> None:
    status, error = server.refused(CHAT, messages=[{"role": "tool", "content": "1"}])
    assert status == 400 and "no tools here" in error["message"]
    for template, word in ((None, "no chat template"), ("{{ broken", "chat template")):
        with running(small_model(), tokenizer_with(template)) as other:
            status, error = other.refused(CHAT, messages=USER)
            assert status == 400 and word in error["message"]


def test_bodies_that_are_none(server: Running) -> None:
    for content in (b"", b"{", b"[]", b"\xff", b'"a"', b'{"prompt": "\\ud800"}', b"[" * 3000):
        response = server.http.post(
            PLAIN, content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400 and response.json()["error"]["message"]
    assert server.http.post(PLAIN, data={"prompt": "a"}).status_code == 415
    assert server.refused(PLAIN, prompt="a" * 5000)[0] == 413
    chunks = server.http.post(
        PLAIN,
        content=(b" " * 1000 for _ in range(9)),
        headers={"Content-Type": "application/json"},
    )
    assert chunks.status_code == 413
    for method, path, status in (("GET", PLAIN, 405), ("GET", "/v2", 404), ("PUT", "/health", 405)):
        response = server.http.request(method, path)
        assert (response.status_code, set(response.json())) == (status, {"error"})
    assert server.refused(PLAIN, prompt="a", model="other")[1]["code"] == "model_not_found"


def test_a_key_is_asked_for() -> None:
    with running(small_model(), TOKENIZER, api_key="sesame") as server:
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sesame"}):
            response = server.http.post(PLAIN, json={"prompt": "a"}, headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        for path in ("/health", "/metrics", "/"):
            assert server.http.get(path).status_code == 200
        assert server.openai.completions.create(model="tiny", prompt="a").choices
        with pytest.raises(openai.AuthenticationError):
            server.openai.with_options(api_key="no").models.list()


def test_pages_of_other_sites_need_leave() -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example")):
        with running(small_model(), TOKENIZER, cors_origins=origins, api_key="k") as server:
            answers = (
                server.http.options(PLAIN, headers=asked),
                server.http.get("/health", headers=asked),
            )
            for answer in answers:
                assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_full_queue_is_429(server: Running) -> None:
    status, error = server.refused(PLAIN, prompt=["a"] * 4)
    assert status == 400 and "3 may wait" in error["message"]

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            tasks = []
            for count in range(1, 8):  # 4 run and 3 wait
                tasks.append(asyncio.create_task(client.post(PLAIN, json=ENDLESS)))
                while present(server) < count:
                    await asyncio.sleep(0.01)
            full = await client.post(PLAIN, json={"prompt": "a"})
            assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(full.headers["retry-after"]) >= 1
            for task in tasks:
                task.cancel()

    asyncio.run(crowd())
    wait_until(lambda: not present(server))
    assert server.post(PLAIN, prompt="a").status_code == 200


def present(server: Running) -> int:
    """Sequences in the engine."""
    stats = server.engine.stats()
    return stats.running + stats.waiting


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_costs_nothing_more(
    server: Running, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlakit.access")
    before = server.engine.stats().finished.get("cancelled", 0)
    body = {**ENDLESS, "n": 2, "stream": stream}
    if stream:
        with server.http.stream("POST", PLAIN, json=body) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(PLAIN, json=body, timeout=0.5)
    wait_until(lambda: server.engine.stats().finished.get("cancelled", 0) == before + 2)
    assert server.engine.stats().pages_used == 0
    wait_until(lambda: any("disconnected" in line for line in caplog.messages))
    line = json.loads(next(line for line in caplog.messages if "disconnected" in line))
    assert line["finish"] == {"cancelled": 2}
    assert line["status"] == (200 if stream else 499)
    assert line["stream"] is stream and line["completion_tokens"] > 0


def test_who_goes_away_before_the_body_is_there(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlakit.access")
    port = server.server.listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"prompt": '
        )
    wait_until(lambda: bool(caplog.messages))
    line = json.loads(caplog.messages[0])
    assert (line["status"], line["reason"]) == (499, "disconnected")


def test_an_engine_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    with running(model, TOKENIZER) as server:
        with monkeypatch.context() as broken:

            def fail(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError("out of paper")

            broken.setattr(model, "forward", fail)
            status, error = server.refused(PLAIN, prompt=["a", "b"])
            assert (status, error["type"]) == (500, "server_error")
            assert "out of paper" in error["message"]
            with pytest.raises(openai.APIError, match="out of paper"):
                list(server.openai.completions.create(model="tiny", prompt="a", stream=True))
        assert server.post(PLAIN, prompt="a").status_code == 200


def test_draining_finishes_what_was_accepted() -> None:
    with running(small_model(2000), TOKENIZER) as server:
        body = {"prompt": "a", "max_tokens": 600, "ignore_eos": True, "temperature": 0}
        with server.http.stream("POST", PLAIN, json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.leave()
            wait_until(lambda: server.server.service.draining)
            with httpx.Client(base_url=server.url, timeout=60) as other:
                health = other.get("/health")
                assert (health.status_code, health.json()) == (503, {"status": "draining"})
                late = other.post(PLAIN, json=body)
                assert late.status_code == 503 and "retry-after" in late.headers
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
    assert server.server.cut_off == 0


@pytest.mark.parametrize("twice", [False, True])
def test_draining_has_an_end(twice: bool) -> None:
    seconds = 60.0 if twice else 0.3
    with running(small_model(2**20), TOKENIZER, drain_seconds=seconds, cache_bytes=2**26) as server:
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(server.post(PLAIN, **ENDLESS)))
        waiting.start()
        wait_until(lambda: server.engine.stats().running == 1)
        server.leave()
        if twice:
            server.leave()
        waiting.join(30)
        assert answers[0].status_code == 503
        assert "stopped" in answers[0].json()["error"]["message"]
    assert server.server.cut_off == 1
