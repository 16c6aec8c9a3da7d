"""Prompts whose answers repeat them, and prompts whose answers do not, and how far an answer does.

What drafting from the prompt gains depends on nothing so much as on the text, so both kinds are measured, and
`echo` says of each answer which kind it is. Knows nothing of how drafts are made.
"""

from collections.abc import Sequence
from typing import Any

STORIES = (
    "The keeper of the lighthouse counted the ships every evening. He wrote their names in a green book, and"
    " beside each name the hour at which it passed. On the last day of October no ship came, and he wrote"
    " that down too. In the morning a boy rowed out to bring him bread, butter and a letter from his sister.",
    "To make the soup, wash six carrots, two onions and a small leek. Cut the onions first and let them turn"
    " golden in a little oil. Add the carrots and the leek, then a litre of water and a spoon of salt. Let it"
    " simmer for twenty minutes, stir in the cream, and serve it hot with yesterday's bread.",
    "The train to the coast leaves at seven from the third platform. It stops at Weston, Harrow Bridge and"
    " Old Mill, where the line crosses the river, and reaches the harbour shortly before nine. From there"
    " the ferry takes forty minutes to the island, unless the wind is from the north.",
)
"""Each is told twice and begun again: the answer goes on as it went before."""

BEGINNING = 12
"""Tokens with which a story begins again."""

QUESTIONS = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain, to a child, why the sky is blue.",
    "What did people believe about comets in the Middle Ages?",
)


def repeating_prompts(tokenizer: Any) -> list[list[int]]:
    """Prompts, as tokens, whose answers are already written in them."""
    told = [tokenizer(story + "\n\n").input_ids for story in STORIES]
    return [2 * story + story[:BEGINNING] for story in told]


def other_prompts(tokenizer: Any) -> list[list[int]]:
    """Prompts, as tokens, that ask for something new, in the model's chat template."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def echo(prompt: Sequence[int], answer: Sequence[int], order: int = 2) -> float:
    """The part of `answer` that comes after some `order` tokens as it came after them the last time."""
    tokens = [*prompt, *answer]
    followed: dict[tuple[int, ...], int] = {}
    expected = 0
    for at in range(order, len(tokens)):
        before = tuple(tokens[at - order : at])
        expected += at >= len(prompt) and followed.get(before) == tokens[at]
        followed[before] = tokens[at]
    return expected / len(answer)
