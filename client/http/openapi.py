"""The API's description as an OpenAPI document, made of the requests' own types."""

from typing import Any

import msgspec

from swarm.client.http.requests import ChatRequest, CompletionRequest
from swarm.version import VERSION

POSTED = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
READ = ("/v1/models", "/v1/models/{model}")
REFUSED = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(model: str) -> dict[str, Any]:
    """The document, in version 3.1 of the specification, of a server that has `model`."""
    schemas, components = msgspec.json.schema_components(
        POSTED.values(), ref_template="#/components/schemas/{name}"
    )
    for kind in POSTED.values():
        components[kind.__name__]["properties"]["model"] = {"enum": [model]}
    paths: dict[str, Any] = {path: {"get": _operation()} for path in READ}
    paths[READ[1]]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"enum": [model]}}
    ]
    for path, schema in zip(POSTED, schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, **_operation("text/event-stream")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Swarm", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(*also: str) -> dict[str, Any]:
    """What every path answers; `also` in these media types."""
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answered: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    answered |= {kind: {} for kind in also}
    refusals = {str(status): {"description": "Refused", "content": refused} for status in REFUSED}
    return {"responses": {"200": {"description": "Answered", "content": answered}, **refusals}}
