"""What may be asked: the requests of the API as frozen values, read from JSON and checked once.

A parameter that is not known here is refused by its name, never ignored; so is one that is known but not to
be had, unless its value asks for nothing. Pure: knows neither the swarm nor HTTP.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from swarm.client.http.refusals import Refusal, unsupported, wrong
from swarm.client.options import MAX_LOGPROBS

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_DEPTH = 64
"""Objects and lists within each other: more than any schema has, and few enough to follow recursively."""

MAX_SEED = 2**63 - 1

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
SomeText = Annotated[str, Meta(min_length=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenId = Annotated[int, Meta(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
BY_TOKEN_ID: dict[str, Any] = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}


CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that OpenAI's API has and this one has not, with the values of each that ask for nothing."""

COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] = False
    include_route: bool = False


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request may hold; `neutral` is known but not to be had, save for these values."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    model: str
    frequency_penalty: Penalty = 0.0
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, Bias], Meta(extra_json_schema=BY_TOKEN_ID)] = {}
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Meta(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    user: str = ""

    def checked(self) -> None:
        """
        Raises:
            Refusal: parameters contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "'stream_options' is only for requests with 'stream': true.")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation", "is not supported.")

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tells_route(self) -> bool:
        """Whether a stream tells who computes its answers."""
        return self.stream_options is not None and self.stream_options.include_route


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


Content: TypeAlias = str | list[TextPart]


class Function(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: CalledFunction
    id: str = ""


class Instruction(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="system"):
    content: Content
    name: str = ""


class DeveloperInstruction(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="developer"
):
    content: Content
    name: str = ""


class UserMessage(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="user"):
    content: Content
    name: str = ""


class AssistantMessage(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    content: Content = ""
    tool_calls: list[ToolCall] = []
    name: str = ""
    annotations: Annotated[list[Any], Meta(max_length=0)] = []


class ToolMessage(Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str = ""
    name: str = ""


Message: TypeAlias = Instruction | DeveloperInstruction | UserMessage | AssistantMessage | ToolMessage


class NamedFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


class PlainText(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class AnyJson(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    pass


class Schema(Struct, frozen=True, forbid_unknown_fields=True, rename={"definition": "schema"}):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    definition: dict[str, Any]
    description: str = ""
    strict: bool = False


class JsonBySchema(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: Schema


class ChatRequest(Asked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    neutral = CHAT_NEUTRAL

    messages: Annotated[list[Message], Meta(min_length=1)]
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: bool = False
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    parallel_tool_calls: bool = True
    response_format: PlainText | AnyJson | JsonBySchema = PlainText()
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: list[Tool] = []
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def checked(self) -> None:
        super().checked()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise wrong("max_tokens", "Give 'max_completion_tokens' or 'max_tokens', not both.")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "'top_logprobs' is only for requests with 'logprobs': true.")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise wrong("tool_choice", "'tool_choice' is only for requests with 'tools'.")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise wrong("tools", "Two of the 'tools' have the same name.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise wrong("tool_choice", f"There is no '{self.tool_choice.function.name}' among the 'tools'.")

    @property
    def most_tokens(self) -> int | None:
        """How long the answer may be, where that was said."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def calls_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(Asked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    neutral = COMPLETION_NEUTRAL

    prompt: SomeText | Annotated[list[SomeText | TokenId | TokenIds], Meta(min_length=1)]
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 16

    def checked(self) -> None:
        super().checked()
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "'max_tokens' of 0 is only for requests with 'echo': true.")
        if len(self.prompts) > MAX_PROMPTS:
            raise wrong("prompt", f"There are {len(self.prompts)} prompts; {MAX_PROMPTS} are the most.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each as a text or as token ids.

        Raises:
            Refusal: it is a list of several kinds of things.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(one) for one in self.prompt}
        if len(kinds) > 1:
            raise wrong("prompt", "The prompt is a list of different kinds of things.")
        if kinds == {int}:
            return [cast(list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)


NESTED = ("messages", "response_format", "stream_options", "tool_choice", "tools")
"""Parameters within which null counts as left out, too."""

ANYTHING = ("parameters", "schema")
"""What holds JSON of any kind there, in which null is a value."""

T = TypeVar("T", bound=Asked)


def read(body: bytes, kind: type[T]) -> T:
    """The request in `body`. Whatever is null there counts as left out, save within JSON of the asker's own.

    Raises:
        Refusal: it is no JSON object, or a parameter is unknown, not supported or out of its range.
    """
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(None, f"The body is no JSON: {error}.") from error
    if not isinstance(given, dict):
        raise wrong(None, "The body is no JSON object.")
    for name, value in given.items():
        if name != "prompt" and _is_deep(value):
            raise wrong(name[:64], f"'{name[:64]}' is nested more than {MAX_DEPTH} deep.")
    return _converted(_without_nothing(given, kind), kind)


def _is_deep(value: Any) -> bool:
    layer: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        parts = (one.values() if isinstance(one, dict) else one for one in layer)
        layer = [one for part in parts for one in part if isinstance(one, dict | list)]
    return bool(layer)


def _without_nothing(given: dict[str, Any], kind: type[Asked]) -> dict[str, Any]:
    """What is asked for, once parameters that ask for nothing are taken out."""
    asked = {}
    for name, value in given.items():
        if name not in kind.__struct_fields__ and name not in kind.neutral:
            raise Refusal(
                400, f"There is no parameter '{name[:64]}'.", param=name[:64], code="unknown_parameter"
            )
        if value is None:
            continue
        if name in kind.__struct_fields__:
            asked[name] = int(value) if isinstance(value, float) and value.is_integer() else value
        elif not any(value == one and type(value) is type(one) for one in kind.neutral[name]):
            raise unsupported(name, "is not supported.")
    return asked | {name: _without_nulls(asked[name]) for name in NESTED if name in asked}


def _without_nulls(value: Any) -> Any:
    """A value as clients send it back: what it has not is null there."""
    match value:
        case dict():
            given = {name: one for name, one in value.items() if one is not None}
            return {name: one if name in ANYTHING else _without_nulls(one) for name, one in given.items()}
        case list():
            return [_without_nulls(one) for one in value]
    return value


def _converted(asked: dict[str, Any], kind: type[T]) -> T:
    try:
        request = msgspec.convert(asked, kind, str_keys=True)
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at ")
        path = re.search(r"`\$\.(.+)`$", place)
        named = path or re.search(r"field `(\w+)`", said)
        raise wrong(named and named[1], f"{said}: '{path[1]}'." if path else f"{said}.") from error
    request.checked()
    return request
