"""The client's answers over real engines, in spans, equal those of transformers on the whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm.blocks.models import resolve
from swarm.client.draft_model import DraftModel
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.tiny import greedy, tiny_checkpoint, tiny_model
from tests.tiny_swarm import SPANS, serving

PROMPT = [1, 5, 9, 9, 30, 77, 64, 12, 100, 3, 45]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, tiny_checkpoint(folder)


@in_virtual_time
async def test_greedy_tokens_are_those_of_transformers(checkpoint: tuple[Path, Any]) -> None:
    folder, whole = checkpoint
    async with serving(resolve(str(folder))) as swarm:
        options = GenerationOptions(max_new_tokens=16, ignore_eos=True)
        answer = await swarm.stream_tokens(PROMPT, options).result()
        assert list(answer.token_ids) == greedy(whole, PROMPT, 16)
        assert [hop.blocks for hop in answer.route] == list(SPANS)
        # a prompt of several chunks, each hop at work on another one at the same time
        long = [(7 * at) % 120 + 4 for at in range(200)]
        answer = await swarm.stream_tokens(long, options).result()
        assert list(answer.token_ids) == greedy(whole, long, 16)


@in_virtual_time
async def test_turns_that_keep_their_kv_are_as_exact(checkpoint: tuple[Path, Any]) -> None:
    folder, whole = checkpoint
    async with serving(resolve(str(folder))) as swarm:
        conversation = swarm.conversation(room=200)
        options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
        prompts = [PROMPT]
        for change in ([20, 21, 22], [30, 31]):
            answer = await swarm.stream_tokens(prompts[-1], options, conversation).result()
            assert list(answer.token_ids) == greedy(whole, prompts[-1], 8)
            prompts.append([*prompts[-1], *answer.token_ids, *change])
        edited = [*prompts[-1][:15], 99, 98]
        answer = await swarm.stream_tokens(edited, options, conversation).result()
        assert list(answer.token_ids) == greedy(whole, edited, 8)
        assert conversation.stepped == (11 + 7) + (4 + 7) + (2 + 7)
        await conversation.close()


@in_virtual_time
async def test_sessions_that_begin_with_what_is_kept_are_as_exact(checkpoint: tuple[Path, Any]) -> None:
    folder, whole = checkpoint
    async with serving(resolve(str(folder))) as swarm:
        options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
        system = [(5 * at) % 120 + 4 for at in range(70)]
        for prompt, cached in (
            (system, 0),
            ([*system, 9, 8, 7], 64),
            ([*system[:40], 1, *system[41:]], 32),
            (system[:64], 63),
            (system, 64),
        ):
            answer = await swarm.stream_tokens(prompt, options).result()
            assert list(answer.token_ids) == greedy(whole, prompt, 8)
            assert answer.cached_tokens == cached
            turn = [*prompt, *answer.token_ids, 3, 4]
        answer = await swarm.stream_tokens(turn, options).result()
        assert list(answer.token_ids) == greedy(whole, turn, 8)
        assert answer.cached_tokens == 64


@in_virtual_time
async def test_chat_goes_through_the_template(checkpoint: tuple[Path, Any]) -> None:
    folder, whole = checkpoint
    async with serving(resolve(str(folder))) as swarm:
        answer = await swarm.generate("How are you?", max_new_tokens=6, ignore_eos=True)
        tokenizer = swarm._ends.tokenizer
        prompt = tokenizer("u:How are you?\na:", add_special_tokens=False).input_ids
        expected = greedy(whole, prompt, 6)
        assert list(answer.token_ids) == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("spans", [SPANS, [Span(SPANS[0].start, SPANS[-1].end)]], ids=["several", "one"])
@in_virtual_time
async def test_hops_that_go_by_themselves_tell_the_same_tokens_sooner(
    checkpoint: tuple[Path, Any], spans: list[Span]
) -> None:
    folder, whole = checkpoint
    options = GenerationOptions(max_new_tokens=80, ignore_eos=True, speculate=False)
    rates = []
    for push in (True, False):
        async with serving(resolve(str(folder)), latency=0.05, spans=spans, push=push) as swarm:
            answer = await swarm.stream_tokens(PROMPT, options).result()
            assert list(answer.token_ids) == greedy(whole, PROMPT, 80)
            rates.append(answer.tokens_per_s)
    assert rates[0] > 5 * rates[1]


SAMPLED = SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=11)


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED])
@pytest.mark.parametrize("seed", [0, 1])
@in_virtual_time
async def test_drafts_over_a_slow_link_change_no_token(
    checkpoint: tuple[Path, Any], sampling: SamplingOptions, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft model is the model itself, so nearly always right, or another one, so hardly ever.

    It is quick, however slow the machine is at the moment.
    """
    folder, whole = checkpoint
    options = GenerationOptions(max_new_tokens=60, ignore_eos=True, sampling=sampling)
    monkeypatch.setattr(DraftModel, "took", lambda *_: None)
    drafts = DraftModel(tiny_model("Llama", seed), 128)
    drafts.seconds_each = 0.001
    async with serving(resolve(str(folder)), latency=0.05, draft_model=drafts, push=False) as swarm:
        plain = await swarm.stream_tokens(PROMPT, replace(options, speculate=False)).result()
        quick = await swarm.stream_tokens(PROMPT, options).result()
    drafts.close()
    assert plain.speculation.steps == 59
    assert quick.token_ids == plain.token_ids
    assert quick.speculation.drafted > 0
    if not sampling.temperature:
        assert list(quick.token_ids) == greedy(whole, PROMPT, 60)
    if seed == 0:
        assert quick.speculation.accepted > 0.9 * quick.speculation.drafted
        assert quick.tokens_per_s > 3 * plain.tokens_per_s
    else:
        assert quick.speculation.accepted < 0.5 * quick.speculation.drafted
