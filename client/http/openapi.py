"""The API's description as an OpenAPI document, made of the requests' own types.

What depends on several parameters at once, on the chat template or on the vocabulary is not in it.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from swarm.client.http.answer_schemas import CHAT_ANSWER, COMPLETION, ERROR, MODEL, MODELS
from swarm.client.http.requests import Asked, ChatRequest, CompletionRequest
from swarm.version import VERSION

POSTED: dict[str, tuple[type[Asked], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, CHAT_ANSWER),
    "/v1/completions": (CompletionRequest, COMPLETION),
}
READ = {"/v1/models": MODELS, "/v1/models/{model}": MODEL}
REFUSED = {
    "400": "A parameter is unknown, not supported or out of its range",
    "401": "The API key is missing or wrong",
    "403": "Asked under a name that is not this machine's",
    "404": "No such model",
    "405": "Not for this path",
    "408": "The request came too slowly",
    "413": "The request is too long",
    "415": "The request is no JSON",
    "429": "No room now",
    "500": "A fault of this server",
    "503": "No servers for the model now, or too many connections",
}


def document(model: str, *, asks_for_keys: bool = False) -> dict[str, Any]:
    """The document, in version 3.1 of the specification, of a server that has `model`."""
    kinds = [kind for kind, _ in POSTED.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for component in components.values():
        _allow_nothing(component)
    for kind in kinds:
        properties = components[kind.__name__]["properties"]
        properties["model"] = {"enum": [model]}
        properties |= {name: {"enum": [*values, None]} for name, values in kind.neutral.items()}
    paths: dict[str, Any] = {path: {"get": _operation(answer)} for path, answer in READ.items()}
    paths["/v1/models/{model}"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"enum": [model]}}
    ]
    for (path, (_, answer)), schema in zip(POSTED.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, **_operation(answer, ["text/event-stream"])}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Swarm", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}} if asks_for_keys else {},
        },
        "security": [{"key": []}] if asks_for_keys else [],
    }


def _allow_nothing(schema: dict[str, Any]) -> None:
    """Let null stand for what may be left out of an object."""
    for name in schema.get("properties", {}).keys() - {*schema.get("required", ())}:
        given = schema["properties"][name]
        kinds: list[Any] = given.get("anyOf", [given])
        if {"type": "null"} not in kinds:
            schema["properties"][name] = {"anyOf": [given, {"type": "null"}]}


def _operation(answer: dict[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
    """What a path answers: `answer`, or a stream in one of the media types `also`."""
    answered: dict[str, Any] = {"application/json": {"schema": answer}, **{kind: {} for kind in also}}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {status: {"description": text, "content": refused} for status, text in REFUSED.items()}
    return {"responses": {"200": {"description": "Answered", "content": answered}, **refusals}}
