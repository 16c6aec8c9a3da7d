"""What a session keeps of linear-attention blocks: spans of any blocks, steps of any size, and going back."""

import pytest
import torch

from swarm.blocks.architecture import part_of
from swarm.blocks.errors import StepError
from swarm.blocks.models import resolve
from swarm.blocks.precision import choose_precision
from swarm.blocks.recurrent import RecurrentSession, StateLayer, state_bytes
from swarm.blocks.shard import load_span
from swarm.spans import Span

CPU = torch.device("cpu")
TOKENS = 23


@pytest.fixture(scope="module")
def module(checkpoint_of):
    model = resolve(str(checkpoint_of("Qwen3Next")[0]))
    return load_span(model, Span(0, 6), choose_precision("float32", CPU, torch.float32), CPU)


@pytest.fixture(scope="module")
def hidden(module):
    return torch.randn(TOKENS, module.config.hidden_size, generator=torch.Generator().manual_seed(0))


def new_session(module, blocks: Span) -> RecurrentSession:
    return RecurrentSession(module.config, blocks, TOKENS)


def step(module, session, rows):
    start = session.length
    with torch.inference_mode():
        return part_of(module, session.blocks)(
            inputs_embeds=rows[None],
            position_ids=torch.arange(start, start + len(rows))[None],
            past_key_values=session,
            use_cache=True,
        ).last_hidden_state[0]


LINEAR_ALONE, MIXED, ATTENTION_ALONE = Span(0, 2), Span(1, 6), Span(2, 3)


@pytest.mark.parametrize("blocks", [LINEAR_ALONE, MIXED, ATTENTION_ALONE])
def test_steps_of_any_size_give_what_one_gives(module, hidden, blocks):
    whole = step(module, new_session(module, blocks), hidden)
    session = new_session(module, blocks)
    parts = [step(module, session, rows) for rows in hidden.split([1, 1, 7, 1, 2, 10, 1])]
    assert session.length == session.get_seq_length() == TOKENS
    assert torch.allclose(torch.cat(parts), whole, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("blocks", [LINEAR_ALONE, MIXED])
def test_the_last_step_can_be_taken_back_and_taken_anew(module, hidden, blocks, size):
    session = new_session(module, blocks)
    step(module, session, hidden[:8])
    first = step(module, session, hidden[8 : 8 + size])
    session.roll_back(8)
    step(module, session, -hidden[8 : 8 + size])
    session.roll_back(8)
    assert session.length == 8
    assert torch.equal(step(module, session, hidden[8 : 8 + size]), first)


def test_the_first_step_and_the_whole_sequence_can_be_taken_back(module, hidden):
    session = new_session(module, MIXED)
    first = step(module, session, hidden[:6])
    session.roll_back(0)
    assert torch.equal(step(module, session, hidden[:6]), first)
    step(module, session, hidden[6:9])
    session.roll_back(0)
    assert session.length == 0
    assert torch.equal(step(module, session, hidden[:6]), first)


def test_going_back_elsewhere_is_refused_and_changes_nothing(module, hidden):
    session = new_session(module, MIXED)
    whole = step(module, new_session(module, MIXED), hidden)
    step(module, session, hidden[:8])
    step(module, session, hidden[8:12])
    for length in (1, 7, 9, 11):
        with pytest.raises(StepError) as refusal:
            session.roll_back(length)
        assert refusal.value.code == "bad_request"
    assert session.length == 12
    assert torch.allclose(step(module, session, hidden[12:]), whole[12:], atol=1e-3)
    session.roll_back(12)
    with pytest.raises(StepError):
        session.roll_back(8)


def test_a_step_that_failed_halfway_is_taken_back(module, hidden, monkeypatch):
    session = new_session(module, MIXED)
    step(module, session, hidden[:8])
    monkeypatch.setattr(module.layers[3], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(module, session, hidden[8:10])
    monkeypatch.undo()
    session.roll_back(8)
    whole = step(module, new_session(module, MIXED), hidden)
    assert torch.allclose(step(module, session, hidden[8:]), whole[8:], atol=1e-3)


def test_attention_alone_goes_back_anywhere(module, hidden):
    session = new_session(module, ATTENTION_ALONE)
    whole = step(module, session, hidden)
    session.roll_back(5)
    assert torch.allclose(step(module, session, hidden[5:]), whole[5:], atol=1e-3)


def test_states_take_no_more_than_is_said(module, hidden):
    session = new_session(module, Span(0, 6))
    step(module, session, hidden[:8])
    step(module, session, hidden[8:9])
    layers = [layer for layer in session.layers if isinstance(layer, StateLayer)]
    assert len(layers) == 4
    states = [(layer.conv_states[0], layer.recurrent_states[0], *layer._before) for layer in layers]
    taken = sum(tensor.untyped_storage().nbytes() for four in states for tensor in four)
    assert taken == state_bytes(module.config, Span(0, 6), 4)
