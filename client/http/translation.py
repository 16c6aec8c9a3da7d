"""From a request to how an answer is made: the options, and the grammar it is held to.

Pure, but for a grammar, which takes some milliseconds to make. Knows nothing of sessions or HTTP.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.client.grammar import Grammar, Vocabulary, json_text, styled
from swarm.client.http.refusals import unsupported, wrong
from swarm.client.http.requests import (
    AnyJson,
    Asked,
    ChatRequest,
    CompletionRequest,
    Function,
    JsonBySchema,
    NamedTool,
    PlainText,
    Tool,
)
from swarm.client.http.tool_calls import BEGIN, END
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.errors import InputError

SEEDS = 2**63


def chat_options(
    request: ChatRequest, choice: int, default_tokens: int, grammar: Grammar | None
) -> GenerationOptions:
    """For choice number `choice`. An answer without a length of its own may have `default_tokens`.

    Raises:
        InputError: see `GenerationOptions`.
    """
    stops = _stops(request)
    if request.calls_tools and not request.parallel_tool_calls:
        stops = (*stops, END)
    return GenerationOptions(
        max_new_tokens=request.most_tokens or default_tokens,
        sampling=_sampling(request, choice),
        stop=stops,
        ignore_eos=request.ignore_eos,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=grammar,
    )


def completion_options(request: CompletionRequest, choice: int) -> GenerationOptions:
    """For choice number `choice`. One token is made at least: it comes with reading the prompt.

    Raises:
        InputError: see `GenerationOptions`.
    """
    return GenerationOptions(
        max_new_tokens=max(request.max_tokens, 1),
        sampling=_sampling(request, choice),
        stop=_stops(request),
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        score_prompt=request.echo and request.logprobs is not None,
    )


def _stops(request: Asked) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _sampling(request: Asked, choice: int) -> SamplingOptions:
    """Each choice has a seed of its own, so that they differ and come again."""
    return SamplingOptions(
        temperature=request.temperature,
        top_k=request.top_k if request.top_k and request.top_k > 0 else None,
        top_p=request.top_p if request.top_p < 1 else None,
        min_p=request.min_p or None,
        repetition_penalty=request.repetition_penalty,
        seed=None if request.seed is None else (request.seed + choice) % SEEDS,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
    )


def needs_grammar(request: ChatRequest) -> bool:
    return not isinstance(request.response_format, PlainText) or must_call(request) or _is_strict(request)


def must_call(request: ChatRequest) -> bool:
    """Whether the answer must be a call of a tool."""
    return request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)


def _is_strict(request: ChatRequest) -> bool:
    """Whether calls must fit the schema of their tool even where the model chooses to make them."""
    return request.calls_tools and any(tool.function.strict for tool in request.tools)


def grammar_of(request: ChatRequest, vocabulary: Vocabulary) -> Grammar:
    """What the answer is held to, where something is asked of it. Blocks.

    Raises:
        Refusal: it asks for two things at once, or for a schema that cannot be enforced.
    """
    wanted = request.response_format
    if not isinstance(wanted, PlainText) and request.calls_tools:
        raise unsupported("response_format", "cannot be combined with 'tools'.")
    if request.ignore_eos:
        raise unsupported("ignore_eos", "cannot be combined with an answer of a given form.")
    param = "response_format" if isinstance(wanted, AnyJson | JsonBySchema) else "tools"
    try:
        match wanted:
            case AnyJson():
                return vocabulary.json({"type": "object"})
            case JsonBySchema():
                return vocabulary.json(wanted.json_schema.definition)
        return vocabulary.lark(_calls(request) if must_call(request) else _talk(request.tools))
    except InputError as error:
        raise wrong(param, str(error)) from error


def _calls(request: ChatRequest) -> str:
    """Grammar of an answer that calls one or several of the tools, or the one that is chosen."""
    chosen = request.tool_choice
    tools = [
        tool
        for tool in request.tools
        if not isinstance(chosen, NamedTool) or tool.function.name == chosen.function.name
    ]
    is_one = isinstance(chosen, NamedTool) or not request.parallel_tool_calls
    start = "start: call" if is_one else 'start: call ("\\n" call)*'
    return "\n".join([start, f"call: {json_text(BEGIN)} one_call", *_one_call(tools)])


def _talk(tools: Sequence[Tool]) -> str:
    """Grammar of an answer that may say anything, and call the tools, strict ones by their schemas."""
    loose = [
        tool if tool.function.strict else Tool("function", Function(tool.function.name)) for tool in tools
    ]
    said = f"/(?s:.*)/ & ~/(?s:.*){BEGIN}(?s:.*)/"
    return "\n".join(
        [
            "start: (up_to_call one_call)* said",
            f"up_to_call[lazy]: /(?s:.*){BEGIN}/",
            "said: SAID",
            f"SAID: {said}",
            *_one_call(loose),
        ]
    )


def _one_call(tools: Sequence[Tool]) -> list[str]:
    """Rules of a call of one of the tools, from behind its beginning on."""
    either = " | ".join(f"tool_{at}" for at in range(len(tools)))
    call = f"one_call: {json_text(chr(10))} ({either}) {json_text(chr(10) + END)}"
    return [call, *(f"tool_{at}: {_call(tool)}" for at, tool in enumerate(tools))]


def _call(tool: Tool) -> str:
    opening = f'{{"name": {json_text(tool.function.name)}, "arguments": '
    schema: dict[str, Any] = {"type": "object", **tool.function.parameters}
    return f"{json_text(opening)} %json {json_text(styled(schema))} {json_text('}')}"


def served_names(name: str, model_id: str, given: str) -> tuple[str, ...]:
    """What the model is called: the name it is listed under first, and others that mean it.

    One that is loaded from a folder goes by the folder's name, since its path is nobody's business.
    """
    short = re.sub(r"^.*[/\\]", "", name.rstrip("/\\"))
    listed = short if Path(name).is_absolute() else name
    return tuple(dict.fromkeys((listed, short, name, given or name, model_id)))
