"""The server keeps to the document at /openapi.json, whatever schemathesis thinks of to send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="mlakit[serve] is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from serving_http import Running, running, small_model, tokenizer_with  # noqa: E402

EXAMPLES = 15
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    with running(small_model(128), tokenizer_with(template), max_waiting=2000) as found:
        yield found


OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]
CASES = [
    *((GenerationMode.POSITIVE, *operation) for operation in OPERATIONS),
    *((GenerationMode.NEGATIVE, *operation) for operation in OPERATIONS[:2]),
]


@pytest.mark.parametrize("mode,method,path", CASES)
def test_answers_are_as_documented(
    server: Running, mode: GenerationMode, method: str, path: str
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    wrong = mode is GenerationMode.NEGATIVE
    checks = [*CHECKS, negative_data_rejection] if wrong else CHECKS
    statuses: list[int] = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, checks=checks)

    send()
    if method == "POST":
        assert (200 in statuses) is not wrong
    stats = server.engine.stats()
    assert stats.running == stats.waiting == 0
    assert server.http.get("/health").status_code == 200
