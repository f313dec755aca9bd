"""The OpenAPI document of the server, from the models that read requests and write answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from mlakit import __version__
from mlakit.serving.http.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
)
from mlakit.serving.http.protocol import ChatRequest, CompletionRequest
from mlakit.serving.http.refusal import ErrorBody

REFERENCE = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest)
ANSWERS: tuple[type[BaseModel], ...] = (
    *(Completion, ChatCompletion, ChatChunk),
    *(ModelList, ModelCard, Health, ErrorBody),
)


def document(model: str, tokens: int) -> dict[str, Any]:
    """OpenAPI 3.1, as JSON takes it.

    Args:
        model: name of the served model.
        tokens: most of a prompt and its continuation.
    """
    kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((kind, "validation") for kind in BODIES),
        *((kind, "serialization") for kind in ANSWERS),
    ]
    _, schemas = models_json_schema(kinds, ref_template=REFERENCE)
    for body in BODIES:
        fields = schemas["$defs"][body.__name__]["properties"]
        fields["model"]["anyOf"][0]["enum"] = [model]
        for name in fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields[name]["anyOf"][0]["maximum"] = tokens - 1
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlakit serve", "version": __version__},
        "paths": {
            "/v1/completions": {
                "post": _generation("Continue texts.", CompletionRequest, Completion, Completion)
            },
            "/v1/chat/completions": {
                "post": _generation("Answer in a chat.", ChatRequest, ChatCompletion, ChatChunk)
            },
            "/v1/models": {"get": _reading("What is served.", {200: ModelList}, 401)},
            "/v1/models/{id}": {
                "get": {
                    **_reading("The served model.", {200: ModelCard}, 401, 404),
                    "parameters": [
                        {
                            "name": "id",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/health": {"get": _reading("Are requests taken?", {200: Health, 503: Health})},
            "/metrics": {
                "get": {
                    "summary": "Figures for Prometheus.",
                    "responses": {"200": {"description": "OK", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _generation(
    words: str, body: type[BaseModel], answer: type[BaseModel], chunk: type[BaseModel]
) -> dict[str, Any]:
    operation = _reading(words, {200: answer}, 400, 401, 404, 413, 415, 429, 500, 503)
    operation["requestBody"] = {"required": True, "content": _content(body)}
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {"type": "string", "description": f"Events: {chunk.__name__}, then [DONE]."}
    }
    return operation


def _reading(words: str, answers: dict[int, type[BaseModel]], *errors: int) -> dict[str, Any]:
    """An operation with its answers by status."""
    answers = answers | dict.fromkeys(errors, ErrorBody)
    operation: dict[str, Any] = {
        "summary": words,
        "responses": {
            str(status): {
                "description": "OK" if status == 200 else "Not done; the body says why.",
                "content": _content(kind),
            }
            for status, kind in answers.items()
        },
    }
    if 401 in errors:
        operation["security"] = [{}, {"key": []}]
    return operation


def _content(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=kind.__name__)}}}
