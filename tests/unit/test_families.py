"""What sets families apart: who is refused, what a block keeps, and our layers against transformers' own."""

import pytest
import torch
from transformers import DeepseekV3Config, Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from swarm.blocks.adapted import LatentAttention, Llama4Moe, chunk_of, temper
from swarm.blocks.architecture import ATTENTION, ends_model, load_config, span_model
from swarm.blocks.families import FAMILIES, KVShape, family_of, kv_shapes
from swarm.blocks.head import Head
from swarm.blocks.models import resolve
from swarm.blocks.precision import Precision
from swarm.blocks.recurrent import KeyValueLayer
from swarm.blocks.shard import load_span
from swarm.errors import InputError
from swarm.kernels.attention import attend, attend_plainly
from swarm.spans import Span
from tests.tiny import COMMON, SPECIAL, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
BFLOAT16 = Precision("bfloat16", torch.bfloat16, None, "bfloat16", "raw")


def config_of(checkpoint_of, family):
    return load_config(str(checkpoint_of(family)[0]))


@pytest.mark.parametrize(
    "model_type", ["gemma4_text", "granitemoehybrid", "mamba2", "kimi_linear", "deepseek_v4"]
)
def test_a_family_that_was_not_tried_is_refused_by_name(model_type):
    with pytest.raises(InputError, match=f"'{model_type}' does not run here") as refusal:
        family_of({"model_type": model_type})
    assert "\n" not in str(refusal.value)


def test_code_that_comes_with_a_model_is_never_run():
    with pytest.raises(InputError, match="never run"):
        family_of({"model_type": "their_own", "auto_map": {"AutoModel": "modeling.Theirs"}})


def test_every_family_that_is_listed_is_tested_as_a_whole_swarm():
    assert {tiny_model(family).config.model_type for family in SPECIAL} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "span", "expected"),
    [
        ("Llama", Span(1, 3), [KVShape(2, 8, 8)] * 2),
        ("Llama4", Span(0, 1), [KVShape(2, 8, 8)]),
        ("DeepseekV3", Span(1, 3), [KVShape(1, 16, 12)] * 2),
        ("Qwen3Next", Span(1, 4), [None, KVShape(2, 8, 8), None]),
    ],
)
def test_what_a_block_keeps_of_a_token_is_known_before_it_runs(family, span, expected, checkpoint_of):
    config = config_of(checkpoint_of, family)
    assert kv_shapes(config, span) == expected
    with torch.inference_mode():
        kept = span_model(config, span, torch.float32)
    assert len(kept.layers) == span.size


@pytest.mark.parametrize("family", ["Llama", "GptOss", "DeepseekV3", "Llama4"])
def test_a_block_keeps_what_was_said(family, checkpoint_of):
    model = resolve(str(checkpoint_of(family)[0]))
    span = Span(0, 2)
    module = load_span(model, span, Precision("float32", torch.float32, None, "float32", "raw"), CPU)
    layers = [KeyValueLayer(5) for _ in span.blocks]
    with torch.inference_mode():
        module(
            inputs_embeds=torch.randn(1, 5, model.hidden_size),
            position_ids=torch.arange(5)[None],
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
        )
    found = [KVShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    assert found == kv_shapes(module.config, span)


def test_the_text_model_of_one_that_also_sees_runs(tmp_path):
    text = {**COMMON, **SPECIAL["Llama4"], "floor_scale": 1000}
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sees |= {"image_size": 28, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    torch.manual_seed(0)
    reference = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=sees)).eval()
    reference.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, span, ids = resolve(str(tmp_path)), Span(0, 6), torch.tensor([5, 9, 11, 40, 7, 6, 5, 8, 60, 61])
    assert (model.model_type, model.num_blocks) == ("llama4_text", 6)
    head = Head.load(model, "float32", "cpu")
    module = load_span(model, span, Precision("float32", torch.float32, None, "float32", "raw"), CPU)
    with torch.inference_mode():
        hidden = module(
            inputs_embeds=head.embed(ids)[None],
            position_ids=torch.arange(len(ids))[None],
            past_key_values=Cache(layers=[KeyValueLayer(len(ids)) for _ in span.blocks]),
            use_cache=True,
        ).last_hidden_state[0]
        expected = reference(input_ids=ids[None]).logits[0]
    assert torch.allclose(head.logits(hidden), expected, atol=1e-4)


def test_embeddings_are_multiplied_once_and_at_the_ends(checkpoint_of):
    folder, reference = checkpoint_of("Granite")
    factor = reference.config.embedding_multiplier
    assert factor != 1
    config = load_config(str(folder))
    assert span_model(config, Span(0, 1), torch.float32).embedding_multiplier == 1
    assert ends_model(config, torch.float32).model.embedding_multiplier == 1
    assert config.embedding_multiplier == factor
    ids = torch.tensor([5, 9, 5])
    embedded = Head.load(resolve(str(folder)), "float32", "cpu").embed(ids)
    with torch.inference_mode():
        assert torch.equal(embedded, reference.get_input_embeddings()(ids) * factor)


def test_logits_are_divided_as_the_model_does(checkpoint_of):
    folder, reference = checkpoint_of("Granite")
    head = Head.load(resolve(str(folder)), "float32", "cpu")
    hidden = torch.randn(3, 32)
    with torch.inference_mode():
        expected = reference.lm_head(reference.model.norm(hidden)) / reference.config.logits_scaling
    assert torch.allclose(head.logits(hidden), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": None}, {"rope_interleave": False}])
def test_attention_over_latents_is_deepseeks_own(options):
    torch.manual_seed(0)
    special = {**SPECIAL["DeepseekV3"], "hidden_size": 32, "num_attention_heads": 4, **options}
    config = DeepseekV3Config(**special)
    config._attn_implementation = "eager"
    theirs = DeepseekV3Attention(config, 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config_of_ours = DeepseekV3Config(**special)
    config_of_ours._attn_implementation = ATTENTION
    ours = LatentAttention(config_of_ours, 0).eval()
    ours.load_state_dict(theirs.state_dict())
    rotary = DeepseekV3RotaryEmbedding(config)
    caches = DynamicCache(), Cache(layers=[KeyValueLayer(11)])
    with torch.inference_mode():
        for start, end in ((0, 6), (6, 7), (7, 11)):
            hidden = torch.randn(1, end - start, 32)
            turns = rotary(hidden, torch.arange(start, end)[None])
            seen = torch.ones(end - start, end).tril(start).log()[None, None]
            expected, _ = theirs(hidden, turns, seen, caches[0])
            found, _ = ours(hidden, turns, None, caches[1])
            assert torch.allclose(found, expected, atol=1e-5)


def test_llama_4_experts_get_the_rows_that_chose_them(checkpoint_of):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=1
    )
    theirs, ours = Llama4TextMoe(config).eval(), Llama4Moe(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(1, 9, 16)
    with torch.inference_mode():
        for found, expected in zip(ours(hidden), theirs(hidden), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_llama_4_blocks_tell_their_chunk_and_temper_queries_by_position(checkpoint_of):
    module = span_model(config_of(checkpoint_of, "Llama4"), Span(1, 4), torch.float32)
    chunked, plain = module.layers[0].self_attn, module.layers[1].self_attn
    assert (chunk_of(chunked), chunk_of(plain)) == (9, None)
    query, positions = torch.ones(2, 3, 8), torch.tensor([0, 6, 47])
    assert temper(chunked, query, positions) is query
    scales = 1 + 0.1 * torch.log1p(torch.floor((positions + 1.0) / 4))
    assert torch.allclose(temper(plain, query, positions), scales[None, :, None] * query)
    assert temper(torch.nn.Identity(), query, positions) is query


@pytest.mark.parametrize(("tokens", "length"), [(1, 4), (1, 9), (1, 10), (5, 12), (20, 20), (3, 18), (2, 19)])
def test_a_query_sees_its_own_chunk_alone(tokens, length):
    torch.manual_seed(0)
    query, key, value = torch.randn(4, tokens, 8), torch.randn(2, length, 8), torch.randn(2, length, 6)
    at = torch.arange(length - tokens, length)[:, None]
    position = torch.arange(length)[None]
    sees = (position <= at) & (position // 9 == at // 9)
    scores = query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.3
    expected = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 0)
    for way in (attend, attend_plainly):
        assert torch.allclose(way(query, key, value, scale=0.3, chunk=9), expected, atol=1e-5)


def test_what_must_stay_wide_does_in_any_dtype(checkpoint_of):
    folder, reference = checkpoint_of("DeepseekV3")
    module = load_span(resolve(str(folder)), Span(2, 3), BFLOAT16, CPU)
    gate = module.layers[0].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(
        gate.e_score_correction_bias, reference.model.layers[2].mlp.gate.e_score_correction_bias
    )
    assert gate.weight.dtype == torch.bfloat16
