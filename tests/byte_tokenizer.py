"""A fast tokenizer whose tokens are bytes, as in the toy swarm, with a chat template that knows tools."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATE = """\
{%- if shout is defined and shout %}{{ '!' }}{% endif %}
{%- if tools %}{{ 't:' + tools | map(attribute='function.name') | join(',') }} <tool_call></tool_call>
{% endif %}
{%- for message in messages %}{{ message.role[0] + ':' + message.content }}
{%- for call in message.tool_calls %}{{ call.function.name }}
{{- call.function.arguments.items() | list | string }}{% endfor %}
{{- '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'a:' }}{% endif %}"""

END = "<|end|>"


def byte_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte b is token b; 256 ends a text."""
    vocabulary = {char: byte for byte, char in _letters().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=template)


def _letters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}
