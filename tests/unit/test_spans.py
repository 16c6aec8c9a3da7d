"""Split spans against the unsplit model: greedy tokens are equal in float32, for every family."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.blocks.architecture import load_config
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.errors import NoCapacity, StepError
from swarm.blocks.families import kv_shapes
from swarm.blocks.forward import PagedForward
from swarm.blocks.head import Head
from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import choose_precision
from swarm.blocks.shard import load_span
from swarm.errors import InputError
from swarm.kernels.codecs import from_wire, to_wire
from swarm.kernels.linear import has_native
from swarm.kernels.pages import Segment
from swarm.spans import Span
from tests.tiny import greedy, tiny_checkpoint

SPANS = (Span(0, 2), Span(2, 3), Span(3, 6))
CPU = torch.device("cpu")
PROMPT = [4 + i * 37 % 95 for i in range(20)]
FLOAT32 = EngineConfig(dtype="float32", device="cpu", kv_tokens=256)


@pytest.fixture(scope="module")
def llama(checkpoint_of):
    folder, reference = checkpoint_of("Llama")
    return resolve(str(folder)), reference


async def engines(model: Model, config: EngineConfig = FLOAT32) -> list[Engine]:
    return [await Engine.load(model, span, config) for span in SPANS]


async def run(servers: list[Engine], hidden: torch.Tensor, seq_pos: int, session: str = "s") -> torch.Tensor:
    for server in servers:
        wire, codec = server.precision.wire_dtype, server.precision.codec
        data = to_wire(hidden, wire, codec)
        result = await server.step(session, seq_pos, data, tuple(hidden.shape), wire, codec)
        hidden = from_wire(result.data, result.shape, result.dtype, result.codec)
    return hidden


async def continuation(
    servers: list[Engine], head: Head, prompt: list[int], count: int, start: int = 0
) -> list[int]:
    tokens, position, new = torch.tensor(prompt[start:]), start, []
    while len(new) < count:
        hidden = await run(servers, head.embed(tokens), position)
        position += len(tokens)
        tokens = head.logits(hidden[-1:])[0].argmax()[None]
        new.append(int(tokens))
    return new


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss", "Qwen3Moe"])
async def test_split_spans_continue_as_the_whole_model_does(family, checkpoint_of):
    folder, reference = checkpoint_of(family)
    model = resolve(str(folder))
    servers, head = await engines(model), Head.load(model, "float32")
    for server in servers:
        server.open_session("s", server.span, 128)
    assert await continuation(servers, head, PROMPT, 16) == greedy(reference, PROMPT, 16)
    hidden = await run(servers, head.embed(torch.tensor(PROMPT)), 0)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(head.logits(hidden), expected, atol=2e-4)


async def test_a_session_is_prefilled_in_steps_rolled_back_and_continued(llama):
    model, reference = llama
    servers, head = await engines(model), Head.load(model, "float32")
    for server in servers:
        server.open_session("s", server.span, 64)
    for start, end in ((0, 3), (3, 4), (4, 11)):
        await run(servers, head.embed(torch.tensor(PROMPT[start:end])), start)
    assert await continuation(servers, head, PROMPT, 12, start=11) == greedy(reference, PROMPT, 12)
    other = [*PROMPT[:7], 50, 51, 52]
    assert await continuation(servers, head, other, 12, start=7) == greedy(reference, other, 12)
    assert await continuation(servers, head, other, 12, start=9) == greedy(reference, other, 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_smaller_precisions_stay_close(llama, dtype):
    model, reference = llama
    config = EngineConfig(dtype=dtype, device="cpu", kv_tokens=64)
    servers, head = await engines(model, config), Head.load(model, dtype)
    for server in servers:
        server.open_session("s", server.span, 64)
    logits = head.logits(
        await run(servers, head.embed(torch.tensor(PROMPT)).to(servers[0].precision.dtype), 0)
    )
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < {"bfloat16": 2e-2, "float16": 1e-5}[dtype]


async def test_sessions_share_the_kv_memory_that_was_granted(llama):
    model, _ = llama
    server = await Engine.load(model, Span(0, 1), EngineConfig(dtype="float32", device="cpu", kv_tokens=96))
    server.open_session("a", server.span, 60)
    with pytest.raises(NoCapacity) as refusal:
        server.open_session("b", server.span, 33)
    assert refusal.value.retry_after
    with pytest.raises(NoCapacity) as refusal:
        server.open_session("b", server.span, 97)
    assert refusal.value.retry_after is None
    server.open_session("b", server.span, 32)
    assert server.kv_tokens_left == 0
    server.close_session("a")
    server.close_session("a")
    assert server.kv_tokens_left == 64
    server.check_integrity()


async def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(llama):
    model, _ = llama
    server = await Engine.load(model, Span(0, 1), FLOAT32)
    server.open_session("s", server.span, 8)
    good = torch.randn(4, model.hidden_size)

    async def step(
        seq_pos: int, hidden: torch.Tensor, session: str = "s", dtype: str = "float32"
    ) -> memoryview:
        return (
            await server.step(session, seq_pos, to_wire(hidden, dtype), tuple(hidden.shape), dtype, "raw")
        ).data

    before = bytes(await step(0, good))
    for bad in (
        step(0, good, session="other"),
        step(5, good),
        step(4, torch.randn(5, model.hidden_size)),
        step(0, torch.randn(4, model.hidden_size + 1)),
        step(0, good, dtype="bfloat16"),
    ):
        with pytest.raises(StepError):
            await bad
    assert bytes(await step(0, good)) == before
    assert server.queue == 0


async def test_a_session_may_use_a_part_of_the_span(llama):
    model, reference = llama
    whole = await Engine.load(model, Span(0, 6), FLOAT32)
    parts = (Span(0, 2), Span(2, 3), Span(3, 6))
    head, tokens, position, new = Head.load(model, "float32"), torch.tensor(PROMPT), 0, []
    for part in parts:
        whole.open_session(str(part), part, 64)
    while len(new) < 12:
        hidden = head.embed(tokens)
        for part in parts:
            hidden = await run([whole], hidden, position, str(part))
        position += len(tokens)
        tokens = head.logits(hidden[-1:])[0].argmax()[None]
        new.append(int(tokens))
    assert new == greedy(reference, PROMPT, 12)
    with pytest.raises(StepError):
        (await Engine.load(model, Span(1, 3), FLOAT32)).open_session("s", Span(0, 2), 8)


@pytest.mark.skipif(not has_native(), reason="the native kernels were not built, or not for this CPU")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_run_natively_come_out_as_transformers_own(family, dtype, checkpoint_of, monkeypatch):
    """Sessions of different lengths in one batch; each row is the same whatever is beside it, bit for bit."""
    model, span = resolve(str(checkpoint_of(family)[0])), Span(1, 5)
    precision = choose_precision(dtype, CPU, torch.float32)
    module, shapes = load_span(model, span, precision, CPU), kv_shapes(load_config(str(model.path)), span)
    native = PagedForward(module, shapes, 8, torch.float32, CPU)
    assert native.is_fused
    monkeypatch.setattr("swarm.blocks.forward.fuse", lambda module, plainly: None)
    plain = PagedForward(module, shapes, 8, torch.float32, CPU)
    assert not plain.is_fused
    hidden, part = torch.randn(100, model.hidden_size), Span(1, 4)
    batches = [
        [Segment(40, 0, [3, 1]), Segment(1, 0, [7])],
        [Segment(1, 40, [3, 1]), Segment(30, 1, [7]), Segment(5, 0, [2])],
        [Segment(1, 41, [3, 1]), Segment(1, 31, [7]), Segment(9, 3, [2])],
    ]
    at = 0
    for parts in batches:
        rows = hidden[at : (at := at + sum(one.rows for one in parts))]
        together = native.run(rows, part, parts)
        assert torch.allclose(together, plain.run(rows, part, parts), atol=2e-4)
        apart = [
            native.run(one_rows[i : i + 1], part, [Segment(1, one.first + i, one.table)])
            for one, one_rows in zip(parts, rows.split([one.rows for one in parts]), strict=True)
            for i in range(one.rows)
        ]
        assert torch.equal(torch.cat(apart), together)


@pytest.mark.skipif(not has_native(), reason="the native kernels were not built, or not for this CPU")
def test_layers_that_compute_something_else_are_left_to_transformers(llama, caplog):
    model, _ = llama
    module = load_span(model, Span(0, 2), choose_precision("float32", CPU, torch.float32), CPU)
    module.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    shapes = kv_shapes(load_config(str(model.path)), Span(0, 2))
    assert not PagedForward(module, shapes, 1, torch.float32, CPU).is_fused
    assert "disagree" in caplog.text


async def test_rates_are_measured_without_taking_sessions_memory(llama):
    model, _ = llama
    server = await Engine.load(model, Span(1, 4), FLOAT32)
    decode, prefill = await server.measure()
    assert decode > 0
    assert prefill > 0
    assert server.kv_tokens_left == 256


def rewritten(folder: Path, target: Path, change) -> Path:
    """A copy of the checkpoint whose tensors went through `change`."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 5)}), "shape"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), "shape"),
        (lambda t: t.pop("model.norm.weight"), "lacks"),
    ],
)
async def test_a_checkpoint_that_does_not_fit_its_config_is_refused_in_one_sentence(
    tmp_path, change, sentence
):
    tiny_checkpoint(tmp_path / "good")
    model = resolve(str(rewritten(tmp_path / "good", tmp_path / "bad", change)))

    async def load_all() -> None:
        await Engine.load(model, Span(0, 2), FLOAT32)
        Head.load(model, "float32")

    with pytest.raises(InputError, match=sentence) as refusal:
        await load_all()
    assert "\n" not in str(refusal.value)


async def test_an_impossible_device_dtype_or_number_is_refused(llama):
    model, _ = llama
    for config in ({"device": "cuda:99"}, {"device": "banana"}, {"dtype": "int3"}):
        with pytest.raises(InputError):
            await Engine.load(model, Span(0, 1), EngineConfig(**config))
    with pytest.raises(InputError):
        EngineConfig(kv_tokens=0)
