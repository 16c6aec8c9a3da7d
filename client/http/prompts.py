"""From what was asked to the model's tokens: messages and tools by its chat template, prompts as they are.

What a template may be told is what its own text mentions; nobody brings a template along.
"""

import inspect
import re
from typing import Any

import msgspec

from swarm.client.answer import TextEnds
from swarm.client.generation import chat_prompt, raw_prompt
from swarm.client.http.completion_shape import Prompt
from swarm.client.http.refusals import Refusal, unsupported, wrong
from swarm.client.http.requests import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    DeveloperInstruction,
    Message,
    Tool,
    ToolCall,
    ToolMessage,
)
from swarm.client.http.tool_calls import BEGIN, END
from swarm.client.text import Detokenizer
from swarm.errors import InputError

RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "messages",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
}
"""What a template is told by this server, or tells the tokenizer rather than the template."""


def chat_tokens(request: ChatRequest, ends: TextEnds, vocab_size: int, context: int) -> list[int]:
    """The tokens of a conversation. Blocks.

    Raises:
        Refusal: the model has no chat template, it refuses the messages, or they are too long.
    """
    tokenizer = ends.tokenizer
    template: dict[str, Any] = _checked_kwargs(request.chat_template_kwargs, tokenizer)
    if request.calls_tools:
        _check_reads_tools(tokenizer)
        template["tools"] = [_tool(tool) for tool in request.tools]
    messages = [_message(message, at) for at, message in enumerate(request.messages)]
    try:
        tokens = chat_prompt(tokenizer, messages, **template)
    except InputError as error:
        raise wrong("messages", error.message) from error
    return _fitting(tokens, "messages", vocab_size, context)


def completion_prompts(
    request: CompletionRequest, ends: TextEnds, vocab_size: int, context: int
) -> list[Prompt]:
    """The prompts as tokens, and as text where that is asked for. Blocks.

    Raises:
        Refusal: a prompt is empty, too long, or has a token that the model has not.
    """
    prompts = []
    for given in request.prompts:
        tokens = raw_prompt(ends.tokenizer, given) if isinstance(given, str) else given
        _fitting(tokens, "prompt", vocab_size, context)
        prompts.append(_told(given, tokens, ends.tokenizer) if request.echo else Prompt(tuple(tokens)))
    return prompts


def _told(given: str | list[int], tokens: list[int], tokenizer: Any) -> Prompt:
    """The prompt with its text, special tokens included, and where in that each token begins."""
    if isinstance(given, str) and tokenizer.is_fast:
        places = tokenizer(given, return_offsets_mapping=True).offset_mapping
        return Prompt(tuple(tokens), given, tuple(start for start, _ in places))
    detokenizer, offsets, text = Detokenizer(tokenizer, tells_special=True), [], ""
    for token in tokens:
        offsets.append(len(text))
        text += detokenizer.push(token)
    text += detokenizer.flush()
    return Prompt(tuple(tokens), given if isinstance(given, str) else text, tuple(offsets))


def _fitting(tokens: list[int], param: str, vocab_size: int, context: int) -> list[int]:
    if not tokens:
        raise wrong(param, f"The '{param}' has no tokens.")
    if max(tokens) >= vocab_size:
        raise wrong(param, f"This model has no token {max(tokens)}; its last is {vocab_size - 1}.")
    if len(tokens) >= context:
        message = f"The '{param}' has {len(tokens)} tokens; this model takes fewer than {context}."
        raise Refusal(400, message, param=param, code="context_length_exceeded")
    return tokens


def _checked_kwargs(given: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """
    Raises:
        Refusal: the template does not ask for such a thing.
    """
    taken = RESERVED | inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    text = template_text(tokenizer)
    for name in given:
        if name in taken or not (name.isidentifier() and re.search(rf"\b{re.escape(name)}\b", text)):
            raise unsupported(
                "chat_template_kwargs", f"has '{name[:64]}', which this model's chat template does not read."
            )
    return dict(given)


def template_text(tokenizer: Any) -> str:
    """The text of a tokenizer's chat template, of all of them where it has several."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def _check_reads_tools(tokenizer: Any) -> None:
    text = template_text(tokenizer)
    if not re.search(r"\btools\b", text):
        raise unsupported("tools", "cannot be used: this model's chat template knows no tools.")
    if BEGIN not in text or END not in text:
        raise unsupported(
            "tools", f"cannot be used: this model calls tools in another way than between {BEGIN} and {END}."
        )


def _tool(tool: Tool) -> dict[str, Any]:
    function = msgspec.to_builtins(tool.function)
    del function["strict"]
    return {"type": "function", "function": function}


def _message(message: Message, at: int) -> dict[str, Any]:
    """A message as chat templates read it."""
    told: dict[str, Any] = {"role": _role(message), "content": _text(message.content)}
    if message.name:
        told["name"] = message.name
    match message:
        case AssistantMessage(tool_calls=[_, *_]):
            told["tool_calls"] = [_call(call, f"messages[{at}].tool_calls") for call in message.tool_calls]
        case ToolMessage():
            told["tool_call_id"] = message.tool_call_id
    return told


def _role(message: Message) -> str:
    if isinstance(message, DeveloperInstruction):
        return "system"  # the newer word for the same, which templates do not know
    return str(message.__struct_config__.tag)


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _call(call: ToolCall, param: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as the model does."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except msgspec.DecodeError as error:
        raise wrong(param, f"The arguments of '{call.function.name}' are no JSON: {error}.") from error
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
