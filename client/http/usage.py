"""What a request has cost, in tokens, as OpenAI's API says it. Pure."""

from collections.abc import Mapping
from typing import Any

from swarm.client.generation import Generation


def usage(
    answers: Mapping[int, Generation], choices_each: int, *, counts_answers: bool = True
) -> dict[str, Any]:
    """Of all choices, `choices_each` of which answer the same prompt: each prompt counts once."""
    firsts = [answer for index, answer in answers.items() if index % choices_each == 0]
    prompt = sum(answer.prompt_tokens for answer in firsts)
    completion = sum(len(answer.token_ids) for answer in answers.values()) if counts_answers else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in firsts)},
    }
