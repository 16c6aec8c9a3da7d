"""The draft model: what it drafts, how it rolls back, and which models it refuses to be."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from swarm.client.draft_model import PRIOR, DraftModel, ModelDrafter
from swarm.client.options import SamplingOptions
from swarm.client.sampling import Sampler
from swarm.client.speculation import MAX_DRAFT
from swarm.errors import InputError
from tests.tiny import greedy, tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPT = [1, 5, 9, 9, 30, 77, 64, 12, 100, 3, 45]
VOCABULARY = 128


@pytest.fixture(scope="module", params=["Llama", "Gemma3"])
def whole(request: Any) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def model(whole: Any) -> Iterator[DraftModel]:
    """Of the two families, one keeps only a window of what it has read in the cache of its own choice."""
    drafts = DraftModel(whole, VOCABULARY)
    yield drafts
    drafts.close()


async def reading_ended(drafter: ModelDrafter) -> None:
    async with asyncio.timeout(20):
        await asyncio.wrap_future(drafter._reading)


async def test_drafts_are_its_own_greedy_tokens(whole: Any, model: DraftModel) -> None:
    expected = greedy(whole, PROMPT, 12)
    drafter = model.drafter(PROMPT, Sampler(SamplingOptions(), first=len(PROMPT)))
    await reading_ended(drafter)
    assert drafter.odds() == [PRIOR] * MAX_DRAFT
    assert await drafter.draft(5) == expected[:5]
    for token in expected[:5]:
        drafter.push(token)
    better = drafter.odds()[0]
    assert better > PRIOR
    assert await drafter.draft(7) == expected[5:12]
    drafter.push((expected[5] + 1) % VOCABULARY)
    assert drafter.odds()[0] < better


async def test_refused_drafts_are_rolled_back(whole: Any, model: DraftModel) -> None:
    drafter = model.drafter(PROMPT, Sampler(SamplingOptions(), first=len(PROMPT)))
    sequence = list(PROMPT)
    for accepted in (0, 3, 1, 6, 0, 2, 0):
        drafted = await drafter.draft(6)
        assert drafted == greedy(whole, sequence, 6)
        wrong = (drafted[accepted] + 1) % VOCABULARY if accepted < 6 else 7
        for token in [*drafted[:accepted], wrong]:
            drafter.push(token)
            sequence.append(token)
    drafter.push(8)
    drafter.push(9)
    assert await drafter.draft(2) == greedy(whole, [*sequence, 8, 9], 2)


async def test_drafts_are_sampled_with_the_numbers_of_their_positions(model: DraftModel) -> None:
    options = SamplingOptions(temperature=1.5, top_k=40, repetition_penalty=1.1, seed=4)
    drafted = await model.drafter(PROMPT, Sampler(options, first=len(PROMPT))).draft(10)
    alone, sequence = Sampler(options, first=len(PROMPT)), list(PROMPT)
    for token in drafted:
        assert alone.choose(sequence, model.logits(sequence, DynamicCache())) == token
        sequence.append(token)
    assert len(set(drafted)) > 4


async def test_while_it_reads_the_prompt_there_are_no_odds(model: DraftModel) -> None:
    async with asyncio.timeout(20):
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()
        model.thread.submit(lambda: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result(20))
        drafter = model.drafter(PROMPT, Sampler(SamplingOptions()))
        assert drafter.odds() == ()
        blocked.set()
        await reading_ended(drafter)
        assert drafter.odds()


async def test_closed_drafter_stops_reading(model: DraftModel) -> None:
    drafter = ModelDrafter(model, PROMPT, Sampler(SamplingOptions()))
    drafter.close()
    await reading_ended(drafter)
    long = ModelDrafter(model, [5] * 4000, Sampler(SamplingOptions()))
    long.close()
    await reading_ended(long)
    assert len(long._read) < 4000


async def test_nothing_is_drafted_beyond_its_context_or_vocabulary(model: DraftModel) -> None:
    for tokens in ([5] * (model.context - MAX_DRAFT + 1), [5, VOCABULARY, 6]):
        drafter = model.drafter(tokens, Sampler(SamplingOptions()))
        await reading_ended(drafter)
        assert drafter.odds() == ()


async def test_what_a_token_takes_is_measured(model: DraftModel) -> None:
    assert model.seconds_each > 0
    model.seconds_each = 5.0
    drafter = model.drafter(PROMPT, Sampler(SamplingOptions(), first=len(PROMPT)))
    await reading_ended(drafter)
    await drafter.draft(6)
    assert drafter.seconds_each < 5.0


def test_vocabulary_is_the_smaller_of_both(whole: Any) -> None:
    drafts = DraftModel(whole, 100)
    assert drafts.logits(PROMPT, DynamicCache()).shape == (100,)
    drafts.close()


def test_loads_a_folder_and_gives_its_logits(tmp_path: Path) -> None:
    whole = tiny_checkpoint(tmp_path)
    drafts = DraftModel.load(str(tmp_path), tiny_tokenizer(), VOCABULARY)
    with torch.inference_mode():
        expected = whole(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(drafts.logits(PROMPT, DynamicCache()), expected, atol=1e-4, rtol=1e-4)
    drafts.close()


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    other = tiny_tokenizer()
    other.add_tokens(["unheard of"])
    with pytest.raises(InputError, match=r"has another vocabulary.* smaller model of the same family"):
        DraftModel.load(str(tmp_path), other, VOCABULARY)


def test_models_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        DraftModel.load(str(tmp_path / "nothing"), tiny_tokenizer(), VOCABULARY)
    recurrent = tmp_path / "recurrent"
    tiny_checkpoint(recurrent, "Qwen3Next")
    with pytest.raises(InputError, match="cannot take back tokens"):
        DraftModel.load(str(recurrent), tiny_tokenizer(), VOCABULARY)
    broken = tmp_path / "broken"
    tiny_checkpoint(broken)
    (broken / "tokenizer.json").write_text("{}")
    (broken / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        DraftModel.load(str(broken), tiny_tokenizer(), VOCABULARY)
