"""Inference sessions: dialogues that keep what servers have computed, hidden states by hand, going back."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM
from swarm.errors import InputError, SwarmError
from swarm.server.sessions import Sessions
from tests.tiny_swarm import model_over_swarm

IDS = torch.tensor([[60, 7, 91, 33, 18, 45, 22]])
MORE = torch.tensor([[11, 12, 13]])

Pair = tuple[AutoDistributedModelForCausalLM, Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Of the whole model."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def servers() -> list[Sessions]:
    return []


@pytest.fixture(scope="module")
def pair(checkpoint_of: Callable[[str], tuple[Path, Any]], servers: list[Sessions]) -> Iterator[Pair]:
    folder, whole = checkpoint_of("Llama")
    with model_over_swarm(folder, servers=servers, kv_tokens=6000) as model:
        yield model, whole


@pytest.fixture
def model(pair: Pair) -> AutoDistributedModelForCausalLM:
    return pair[0]


@pytest.fixture
def whole(pair: Pair) -> Any:
    return pair[1]


def tokens_run(servers: list[Sessions]) -> int:
    engine = servers[0]._cell.engine
    assert engine is not None
    stats: Any = engine.stats
    return int(stats.prefill_tokens + stats.decode_tokens)


def until_free(servers: list[Sessions]) -> None:
    """Return once no server holds a session."""
    deadline = time.monotonic() + 20
    while any(server.count for server in servers):
        assert time.monotonic() < deadline, "sessions outlive their client"
        threading.Event().wait(0.01)


def test_a_dialogue_goes_on_where_it_was(
    model: AutoDistributedModelForCausalLM, whole: Any, servers: list[Sessions]
) -> None:
    with model.inference_session(max_length=100) as session:
        before, said = tokens_run(servers), torch.zeros(1, 0, dtype=torch.long)
        for inputs in (IDS, MORE, None, MORE):
            answer = model.generate(inputs, session=session, **GREEDY)
            expected = whole.generate(said if inputs is None else torch.cat([said, inputs], 1), **GREEDY)
            assert answer.equal(expected[:, said.shape[1] :])
            said = expected
        assert session.output_ids is not None
        assert session.output_ids.equal(said)
        assert session.position == said.shape[1] - 1
        assert tokens_run(servers) - before == session.position, "what is known is run once"
    until_free(servers)


def test_token_by_token_is_the_same(model: AutoDistributedModelForCausalLM, whole: Any) -> None:
    """As chat loops written for Petals do it, without naming the session."""
    with model.inference_session(max_length=40):
        prefix, answer = IDS, []
        for _ in range(8):
            answer.append(
                int(model.generate(prefix, max_new_tokens=1, do_sample=False, eos_token_id=None)[0, -1])
            )
            prefix = None
    assert answer == whole.generate(IDS, **{**GREEDY, "max_new_tokens": 8})[0, 7:].tolist()


def test_outside_of_it_nothing_is_remembered(model: AutoDistributedModelForCausalLM) -> None:
    with model.inference_session(max_length=40) as session:
        inside = model.generate(IDS, **GREEDY)
    assert model.generate(IDS, **GREEDY).equal(inside)
    assert session.position == 11


def test_sampling_in_a_session_equals_sampling_from_scratch(pair: Pair) -> None:
    sampled = {"max_new_tokens": 6, "do_sample": True, "repetition_penalty": 1.3, "eos_token_id": None}
    with pair[0].inference_session(max_length=60) as session:
        first = pair[0].generate(IDS, session=session, **GREEDY)
        torch.manual_seed(5)
        second = pair[0].generate(MORE, session=session, **sampled)
    torch.manual_seed(5)
    expected = pair[1].generate(torch.cat([first, MORE], 1), **sampled)
    assert torch.cat([first, second], 1).equal(expected)


def test_going_back_says_something_else(
    model: AutoDistributedModelForCausalLM, whole: Any, servers: list[Sessions]
) -> None:
    with model.inference_session(max_length=60) as session:
        first = model.generate(IDS, session=session, **GREEDY)
        mark = session.position
        model.generate(MORE, session=session, **GREEDY)
        session.position = mark
        before = tokens_run(servers)
        other = model.generate(MORE.flip(1), session=session, **GREEDY)
        assert tokens_run(servers) - before == 3 + 4
        assert torch.cat([first, other], 1).equal(
            whole.generate(torch.cat([first, MORE.flip(1)], 1), **GREEDY)
        )
        session.position = 0
        assert model.generate(MORE, session=session, **GREEDY).equal(whole.generate(MORE, **GREEDY))
        with pytest.raises(InputError, match="position 8"):
            session.position = 8


def test_a_dialogue_of_several_rows(model: AutoDistributedModelForCausalLM, whole: Any) -> None:
    """Padded on the left, and of rows that end at different times."""
    prompt = torch.tensor([[0, 0, 60, 7, 91], [5, 16, 27, 38, 49]])
    mask = (prompt != 0).long()
    free = whole.generate(prompt, attention_mask=mask, **{**GREEDY, "max_new_tokens": 8})
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": int(free[0, 7]), "pad_token_id": 0}
    with model.inference_session(max_length=60) as session:
        first = model.generate(prompt, attention_mask=mask, session=session, **settings)
        assert first.equal(whole.generate(prompt, attention_mask=mask, **settings))
        more = torch.tensor([[0, 70, 71], [80, 81, 82]])
        again = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        second = model.generate(more, attention_mask=(more != 0).long(), session=session, **again)
        with pytest.raises(InputError, match="2 rows"):
            model.generate(IDS, session=session, **again)
    for row in range(2):
        said = torch.cat([first[row], more[row]])
        alone = whole.generate(said[said != 0][None], **again)[0, -4:]
        assert second[row, -4:].equal(alone)


def greedy_by_hand(
    model: AutoDistributedModelForCausalLM, session: Any, ids: Tensor, count: int
) -> list[int]:
    """Tokens that follow `ids` [1, tokens], chosen from hidden states."""
    found: list[int] = []
    for _ in range(count):
        hidden = session.step(
            model.transformer.word_embeddings_layernorm(model.transformer.word_embeddings(ids))
        )
        ids = model.lm_head(model.transformer.ln_f(hidden[:, -1])).argmax(-1)[None]
        found.append(int(ids))
    return found


def test_hidden_states_by_hand(
    model: AutoDistributedModelForCausalLM, whole: Any, servers: list[Sessions]
) -> None:
    expected = whole.generate(IDS, **{**GREEDY, "max_new_tokens": 9})[0, 7:].tolist()
    with model.inference_session(max_length=30) as session:
        assert greedy_by_hand(model, session, IDS, 9) == expected
        assert session.position == 15
        session.position = 7
        assert greedy_by_hand(model, session, torch.tensor([expected[:1]]), 8) == expected[1:]
        session.position = 3
        assert greedy_by_hand(model, session, IDS[:, 3:], 2) == expected[:2]
    until_free(servers)


def test_hidden_states_of_a_batch_through_some_blocks(
    model: AutoDistributedModelForCausalLM, whole: Any
) -> None:
    ids = torch.tensor([[5 + row * 3 + at * 7 % 90 for at in range(12)] for row in range(3)])
    states = whole(ids, output_hidden_states=True).hidden_states
    with model.transformer.h[1:5].inference_session(max_length=12) as session:
        parts = [session.step(part) for part in states[1].split(5, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), states[5], atol=1e-4)
        with pytest.raises(InputError, match="holds 12 tokens; 13"):
            session.step(states[1][:, :1])
        session.position = 4
        assert torch.allclose(session.step(states[1][:, 4:]), states[5][:, 4:], atol=1e-4)


def test_forward_goes_on_in_a_session(model: AutoDistributedModelForCausalLM, whole: Any) -> None:
    expected = whole(IDS).logits
    with model.inference_session(max_length=20) as session:
        first = model(IDS[:, :3], past_key_values=session, use_cache=True)
        assert first.past_key_values is session
        second = model(IDS[:, 3:], past_key_values=session, attention_mask=torch.ones(1, 7))
        assert torch.allclose(torch.cat([first.logits, second.logits], 1), expected, atol=1e-3)
        with pytest.raises(InputError, match=r"shape \[1, 2\]; it must be \[1, 9\]"):
            model(MORE[:, :2], past_key_values=session, attention_mask=torch.ones(1, 2))
        with pytest.raises(InputError, match="another one than before"):
            model(MORE, past_key_values=session, attention_mask=torch.tensor([[0] + [1] * 9]))


def test_an_answer_that_was_given_up_is_forgotten(model: AutoDistributedModelForCausalLM, whole: Any) -> None:
    def stops(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 15:
            raise KeyboardInterrupt
        return scores

    with model.inference_session(max_length=60) as session:
        first = model.generate(IDS, session=session, **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            model.generate(MORE, session=session, logits_processor=[stops], **GREEDY)
        second = model.generate(MORE, session=session, **GREEDY)
    assert torch.cat([first, second], 1).equal(whole.generate(torch.cat([first, MORE], 1), **GREEDY))


def test_what_does_not_fit_a_session_is_said(
    model: AutoDistributedModelForCausalLM, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    states = torch.zeros(1, 2, 32)
    with model.inference_session(max_length=12) as session:
        model.generate(IDS, session=session, max_new_tokens=2, do_sample=False, eos_token_id=None)
        with pytest.raises(InputError, match="was given tokens"):
            session.step(states)
        with pytest.raises(InputError, match="holds 12 tokens; 13 are needed"):
            model.generate(MORE, session=session, max_new_tokens=6, do_sample=False, eos_token_id=None)
        more = model.generate(MORE, session=session, max_new_tokens=1, do_sample=False, eos_token_id=None)
        assert more.shape == (1, 4), "it can be used on"
    with pytest.raises(SwarmError, match="closed"):
        model.generate(MORE, session=session, max_new_tokens=1)
    with model.inference_session(max_length=20) as session:
        session.step(states)
        with pytest.raises(InputError, match="hidden states were given"):
            model.generate(IDS, **GREEDY)
        for wrong in (torch.zeros(1, 2, 31), torch.zeros(2, 32), torch.zeros(2, 2, 32), IDS):
            with pytest.raises(InputError):
                session.step(wrong)
        with torch.enable_grad(), pytest.raises(InputError, match="gradients"):
            session.step(states.requires_grad_())
    with pytest.raises(InputError, match="inference_session"):
        model.generate(IDS, session=model.transformer.h[:2].inference_session(max_length=9), **GREEDY)
    for foreign in (model.transformer.h[:2].inference_session(max_length=9), DynamicCache()):
        with pytest.raises(InputError, match="no session of this model's"):
            model(IDS, past_key_values=foreign)
    for length in (0, 257):
        with pytest.raises(InputError, match=f"max_length is {length}"):
            model.inference_session(max_length=length)


def test_a_session_that_nobody_holds_is_freed(
    model: AutoDistributedModelForCausalLM, servers: list[Sessions]
) -> None:
    session = model.inference_session(max_length=20)
    model.generate(IDS, session=session, **GREEDY)
    assert servers[0].count == 1
    del session
    gc.collect()
    until_free(servers)
