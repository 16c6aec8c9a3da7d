"""JSON schemas of what the API answers, for its OpenAPI document; the `shape` files make the answers."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(**properties: Schema) -> Schema:
    """With all of `properties`."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _is(value: str) -> Schema:
    return {"const": value}


def _answer(kind: str, choice: Schema) -> Schema:
    usage = _object(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
    )
    return _object(id=TEXT, object=_is(kind), created=COUNT, model=TEXT, choices=_list(choice), usage=usage)


TOKEN: Schema = _object(
    token=TEXT, logprob=NUMBER, bytes=_list({"type": "integer", "minimum": 0, "maximum": 255})
)
TOP: Schema = {"type": "object", "additionalProperties": NUMBER}
CALL: Schema = _object(id=TEXT, type=_is("function"), function=_object(name=TEXT, arguments=TEXT))

MESSAGE: Schema = _object(role=_is("assistant"), content=_or_null(TEXT), refusal={"type": "null"})
MESSAGE["properties"]["tool_calls"] = _list(CALL)

CHAT_ANSWER = _answer(
    "chat.completion",
    _object(
        index=COUNT,
        message=MESSAGE,
        logprobs=_or_null(
            _object(
                content=_list({"allOf": [TOKEN, _object(top_logprobs=_list(TOKEN))]}),
                refusal={"type": "null"},
            )
        ),
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
    ),
)

COMPLETION = _answer(
    "text_completion",
    _object(
        index=COUNT,
        text=TEXT,
        logprobs=_or_null(
            _object(
                tokens=_list(TEXT),
                token_logprobs=_list(_or_null(NUMBER)),
                top_logprobs=_list(_or_null(TOP)),
                text_offset=_list(COUNT),
            )
        ),
        finish_reason={"enum": ["stop", "length"]},
    ),
)

MODEL = _object(id=TEXT, object=_is("model"), created=COUNT, owned_by=TEXT, max_model_len=COUNT)
MODELS = _object(object=_is("list"), data=_list(MODEL))

ERROR = _object(
    error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)),
)
