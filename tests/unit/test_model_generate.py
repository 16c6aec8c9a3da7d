"""`generate` over a swarm equals transformers' own on the unsplit model: tokens, scores, streams, errors."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from swarm.client.model.causal_lm import AutoDistributedModelForCausalLM
from swarm.errors import InputError
from swarm.server.sessions import Sessions
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_swarm import model_over_swarm

FAMILIES = ("Llama", "Qwen2", "Gemma2", "Gemma3", "Granite", "GptOss", "Qwen3Next")
PROMPTS = ([60, 7, 91, 33, 18], [5 + i * 11 % 90 for i in range(40)], [77, 12])
IDS = torch.tensor([PROMPTS[0]])
PAD, EOS = 0, 2


def padded(prompts: Any = PROMPTS) -> dict[str, Tensor]:
    """A batch, padded on the left."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ),
    }


Pair = tuple[AutoDistributedModelForCausalLM, Any]


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
    """A Llama over a swarm, and the same model whole."""
    folder, whole = checkpoint_of("Llama")
    with model_over_swarm(folder, servers=servers, kv_tokens=6000) as model:
        yield model, whole


def both(pair: Pair, *inputs: Any, **keywords: Any) -> tuple[Any, Any]:
    """What the two answer, from the same random state."""
    answers = []
    for model in pair:
        torch.manual_seed(7)
        answers.append(model.generate(*inputs, **keywords))
    return answers[0], answers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_every_family(family: str, checkpoint_of: Callable[[str], tuple[Path, Any]]) -> None:
    folder, whole = checkpoint_of(family)
    with model_over_swarm(folder, kv_tokens=2000) as model:
        greedy = both((model, whole), **padded(), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert greedy[0].equal(greedy[1])
        sampled = both(
            (model, whole), **padded(), max_new_tokens=10, do_sample=True, temperature=0.8, top_p=0.9
        )
        assert sampled[0].equal(sampled[1])
        assert torch.allclose(model(**padded()).logits[:, -1], whole(**padded()).logits[:, -1], atol=1e-3)


class Even(LogitsProcessor):
    """Only even tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


class Sum(StoppingCriteria):
    """Ends once a row's tokens sum up to so much."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.sum(1) > 700


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": 1},
        {"max_length": 50},
        {"max_new_tokens": 12, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 12, "min_new_tokens": 12, "suppress_tokens": [5, 6, 7], "bad_words_ids": [[9]]},
        {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "min_p": 0.01, "typical_p": 0.95},
        {"max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "epsilon_cutoff": 0.001},
        {"max_new_tokens": 12, "sequence_bias": [[[40], 4.0]], "renormalize_logits": True},
        {"max_new_tokens": 12, "exponential_decay_length_penalty": (2, 1.5), "forced_eos_token_id": 2},
        {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([Even()])},
        {"max_new_tokens": 30, "stopping_criteria": StoppingCriteriaList([Sum()])},
        {"max_new_tokens": 12, "prefix_allowed_tokens_fn": lambda row, ids: [11 + row, 50 + len(ids)]},
        {"generation_config": GenerationConfig(max_new_tokens=9, do_sample=True, top_k=20, pad_token_id=0)},
        {"max_new_tokens": 30, "stop_strings": ["A", "zz"], "tokenizer": tiny_tokenizer()},
        {"max_new_tokens": 30, "max_time": 60.0, "num_return_sequences": 2, "do_sample": True},
        {"max_new_tokens": 5, "num_beams": 1, "use_cache": True, "output_attentions": False},
    ],
    ids=lambda keywords: ",".join(keywords),
)
def test_arguments_mean_what_they_mean_in_transformers(pair: Pair, keywords: dict[str, Any]) -> None:
    mine, whole = both(pair, **padded(), **keywords)
    assert mine.equal(whole)


@pytest.mark.parametrize("row", range(3))
def test_rows_that_have_ended_are_left_alone(pair: Pair, servers: list[Sessions], row: int) -> None:
    free = pair[1].generate(**padded(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    ends = int(free[row, 42])
    before = tokens_run(servers)
    mine, whole = both(pair, **padded(), max_new_tokens=40, do_sample=False, eos_token_id=[ends, 3])
    assert mine.equal(whole)
    new = whole[:, 40:]
    alive = torch.cat([torch.ones(3, 1).bool(), ((new == ends) | (new == 3)).cumsum(1)[:, :-1] == 0], dim=1)
    run = sum(map(len, PROMPTS)) + int(alive[:, :-1].sum())
    assert tokens_run(servers) - before <= run


def tokens_run(servers: list[Sessions]) -> int:
    """Tokens that the server of the first blocks has run."""
    engine = servers[0]._cell.engine
    assert engine is not None
    stats: Any = engine.stats
    return int(stats.prefill_tokens + stats.decode_tokens)


def test_a_mask_is_guessed_as_transformers_does(pair: Pair) -> None:
    mine, whole = both(pair, padded()["input_ids"], max_new_tokens=8, do_sample=False)
    assert mine.equal(whole)


def test_without_a_prompt_it_begins_with_the_first_token(pair: Pair) -> None:
    mine, whole = both(pair, max_new_tokens=8, do_sample=False)
    assert mine.equal(whole)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_length_that_transformers_chooses(pair: Pair) -> None:
    mine, whole = both(pair, IDS, do_sample=False, eos_token_id=None)
    assert mine.equal(whole)
    assert mine.shape == (1, 25)


def test_scores_and_logits_are_returned(pair: Pair) -> None:
    mine, whole = both(
        pair,
        **padded(),
        max_new_tokens=6,
        temperature=0.7,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert mine.sequences.equal(whole.sequences)
    for name in ("scores", "logits"):
        assert torch.allclose(torch.stack(mine[name]), torch.stack(whole[name]), atol=1e-3)
    scored = [
        model.compute_transition_scores(answer.sequences, answer.scores, normalize_logits=True)
        for model, answer in zip(pair, (mine, whole), strict=True)
    ]
    assert torch.allclose(*scored, atol=1e-3)


def test_embeddings_may_stand_for_a_prompt(pair: Pair) -> None:
    embeds = pair[1].get_input_embeddings()(torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])).detach()
    mine, whole = both(pair, inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert mine.equal(whole)
    assert pair[0].get_input_embeddings()(torch.tensor([PROMPTS[0]])).equal(embeds[:1])


@pytest.mark.parametrize("sample", [False, True])
def test_prompt_lookup_changes_no_token(pair: Pair, sample: bool) -> None:
    ids = torch.tensor([[*PROMPTS[1], *PROMPTS[1]]])
    plain, _ = both(pair, ids, max_new_tokens=30, do_sample=False)
    mine, whole = both(pair, ids, max_new_tokens=30, do_sample=sample, prompt_lookup_num_tokens=4)
    assert mine.equal(whole)
    assert sample or mine.equal(plain)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_model_may_draft(pair: Pair, seed: int) -> None:
    """It is the model itself, so nearly always right, or another one, so hardly ever."""
    plain, _ = both(pair, IDS, max_new_tokens=30, do_sample=False)
    mine, _ = both(pair, IDS, max_new_tokens=30, do_sample=False, assistant_model=tiny_model("Llama", seed))
    assert mine.equal(plain)


def test_text_is_streamed(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for model in pair:
        model.generate(IDS, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tiny_tokenizer()))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 12


def test_text_is_iterated_while_another_thread_generates(pair: Pair) -> None:
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=30)
    keywords = {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=pair[0].generate, args=(IDS,), kwargs=keywords)
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = pair[1].generate(IDS, max_new_tokens=12, do_sample=False)
    assert "".join(pieces) == tiny_tokenizer().decode(expected[0, 5:])


async def test_works_where_a_loop_already_runs(pair: Pair) -> None:
    mine, whole = both(pair, IDS, max_new_tokens=4, do_sample=False)
    assert mine.equal(whole)


def test_transformers_pipeline_takes_it(pair: Pair) -> None:
    answers = [
        transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())(
            ["Hello", "a longer text"], max_new_tokens=9, do_sample=False
        )
        for model in pair
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"num_beams": 4}, "num_beams=4 .*num_return_sequences"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
        ({"use_cache": False}, "use_cache=False"),
        ({"temprature": 0.5}, "temprature=0.5"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values=.*session="),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"position_ids": [[0]]}, "position_ids"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"custom_generate": "owner/name"}, "custom_generate='owner/name'"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(pair: Pair, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pair[0].generate(IDS, max_new_tokens=4, **keywords)


def test_padding_on_the_right_is_refused(pair: Pair) -> None:
    batch = {name: values.flip(1) for name, values in padded().items()}
    with pytest.raises(InputError, match="Row 0 of the batch ends with padding"):
        pair[0].generate(**batch, max_new_tokens=4)


def test_a_batch_is_no_larger_than_servers_take(pair: Pair) -> None:
    with pytest.raises(InputError, match="33 rows"):
        pair[0].generate(IDS.expand(33, -1), max_new_tokens=2)


def test_a_prompt_beyond_the_context_is_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="256"):
        pair[0].generate(torch.full((1, 300), 9), max_new_tokens=2)


def test_looks_like_a_model_of_transformers(pair: Pair) -> None:
    model, whole = pair
    assert isinstance(model, torch.nn.Module)
    assert isinstance(model, transformers.PreTrainedModel)
    assert model.config.hidden_size == whole.config.hidden_size
    assert model.config.num_hidden_layers == 6
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == EOS
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.can_generate()
    with pytest.raises(InputError, match="cannot be saved"):
        model.save_pretrained("anywhere")
