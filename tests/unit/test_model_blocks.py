"""Slices of a swarm's model: any blocks run alone, as those of the whole model do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM
from swarm.errors import InputError
from swarm.spans import Span
from tests.tiny_swarm import model_over_swarm

IDS = torch.tensor([[60, 7, 91, 33, 18, 45, 22], [5, 16, 27, 38, 49, 60, 71]])
SLICES = (slice(0, 6), slice(1, 5), slice(2, 3), slice(None, 2), slice(-2, None), slice(3, -1))

Pair = tuple[AutoDistributedModelForCausalLM, Any]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Of the whole model."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair(checkpoint_of: Callable[[str], tuple[Path, Any]]) -> Iterator[Pair]:
    folder, whole = checkpoint_of("Llama")
    with model_over_swarm(folder, kv_tokens=6000) as model:
        yield model, whole


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Gemma3", "Granite", "Qwen3Next"])
def test_slices_equal_the_layers_of_the_whole_model(
    family: str, checkpoint_of: Callable[[str], tuple[Path, Any]]
) -> None:
    folder, whole = checkpoint_of(family)
    with model_over_swarm(folder, kv_tokens=2000) as model:
        states = whole(IDS, output_hidden_states=True).hidden_states
        assert torch.allclose(model.transformer.word_embeddings(IDS), states[0], rtol=1e-5)
        for part in SLICES:
            blocks = range(6)[part]
            found = model.transformer.h[part](states[blocks.start])
            if blocks.stop == 6:
                found = model.transformer.ln_f(found)
            assert torch.allclose(found, states[blocks.stop], rtol=1e-3, atol=1e-4), part


def test_it_is_sliced_like_a_list(pair: Pair) -> None:
    blocks = pair[0].transformer.h
    assert blocks is pair[0].model.layers
    assert isinstance(blocks, nn.Module)
    assert len(blocks) == 6
    assert blocks[2:][1:3].span == Span(3, 5)
    assert blocks[-1].span == Span(5, 6)
    assert [block.span for block in blocks[1:4]] == [Span(1, 2), Span(2, 3), Span(3, 4)]
    assert "blocks 1:4" in repr(blocks[1:4])
    for wrong in (slice(3, 3), slice(0, 6, 2), slice(None, None, -1)):
        with pytest.raises(InputError, match="No blocks"):
            blocks[wrong]
    with pytest.raises(IndexError):
        blocks[6]


def test_block_after_block_is_the_whole(pair: Pair) -> None:
    model, whole = pair
    hidden = model.model.embed_tokens(IDS)
    for block in model.model.layers:
        hidden = block(hidden)
    logits = model.lm_head(model.model.norm(hidden))
    assert torch.allclose(logits, whole(IDS).logits, atol=1e-3)


def test_logits_of_padded_batches(pair: Pair) -> None:
    model, whole = pair
    for padding in (slice(0, 2), slice(5, 7)):
        mask = torch.ones_like(IDS)
        mask[1, padding] = 0
        mine, expected = (one(IDS, attention_mask=mask).logits for one in pair)
        assert torch.allclose(mine[mask.bool()], expected[mask.bool()], atol=1e-3)
        assert not mine[~mask.bool()].any()
    kept = model(input_ids=IDS, logits_to_keep=2)
    assert torch.allclose(kept.logits, whole(IDS).logits[:, -2:], atol=1e-3)
    (logits,) = model(inputs_embeds=model.get_input_embeddings()(IDS), return_dict=False)
    assert torch.allclose(logits, whole(IDS).logits, atol=1e-3)


def test_hidden_states_without_the_head(pair: Pair) -> None:
    mine, expected = (one.model(IDS).last_hidden_state for one in pair)
    assert torch.allclose(mine, expected, atol=1e-3)


def test_more_rows_than_a_server_takes_go_one_after_the_other(pair: Pair) -> None:
    states = pair[1](IDS, output_hidden_states=True).hidden_states
    many = states[2].repeat(20, 1, 1)
    assert torch.allclose(pair[0].transformer.h[2:4](many), states[4].repeat(20, 1, 1), atol=1e-4)


def test_the_dtype_of_what_is_given_is_kept(pair: Pair) -> None:
    given = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    rounded = pair[0].transformer.h[:1](given.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), pair[0].transformer.h[:1](given.bfloat16().float()), rtol=1e-2)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"labels": IDS}, "labels"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": IDS, "use_cache": True}, "past_key_values=model.inference_session"),
        ({}, "input_ids .* or else inputs_embeds"),
        ({"input_ids": IDS[0]}, "input_ids .* or else inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 2, 31)}, "31 values"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, "attention_mask"),
        ({"input_ids": IDS[:0]}, "no tokens"),
        ({"input_ids": IDS[:, :0]}, "no tokens"),
        ({"input_ids": torch.tensor([[5, 128]])}, "128"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "-1"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_is_said(pair: Pair, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pair[0](**keywords)
    assert pair[0](IDS).logits.shape == (2, 7, 128)


def test_gradients_are_refused(pair: Pair) -> None:
    given = torch.zeros(1, 2, 32, requires_grad=True)
    with torch.enable_grad():
        with pytest.raises(InputError, match="gradients"):
            pair[0](inputs_embeds=given)
        with pytest.raises(InputError, match="gradients"):
            pair[0].transformer.h[1:3](given)
        assert not pair[0].transformer.h[1:3](given.detach()).requires_grad
