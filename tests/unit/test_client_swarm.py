"""The facade over toy servers: answers, conversations, faults and cancellation, on a virtual clock."""

import asyncio
from typing import Any, get_args

import numpy as np
import pytest
import torch

from swarm.client.hop_stream import Deadlines
from swarm.client.options import SessionOptions
from swarm.client.route import NoRoute
from swarm.errors import InputError, SwarmError
from swarm.net import messages
from swarm.net.transport import TransportError
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.toy_swarm import EOS, scripted, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
PROMPT = list(b"the quick brown fox")
REPLICA = {**THREE, "spare": Span(2, 4)}


def refusal(code: Any, retry_after: float | None = None) -> messages.Error:
    return messages.Error(code=code, message="no\x1b[31m, sorry", retry_after=retry_after)


@in_virtual_time
async def test_greedy_answer_is_the_models() -> None:
    async with toy_swarm(THREE) as toy:
        answer = await toy.swarm.generate("the quick brown fox", raw=True, max_new_tokens=9)
        expected = toy.ends.expected(PROMPT, 9)
    assert list(answer.token_ids) == expected
    assert answer.text == bytes(expected).decode()
    assert (answer.prompt_tokens, answer.finish_reason, answer.recoveries) == (len(PROMPT), "length", 0)
    assert [tuple(hop.blocks) for hop in answer.route] == [(0, 2), (2, 4), (4, 6)]
    assert [hop.name for hop in answer.route] == ["a", "b", "c"]
    assert all((hop.queue_ms, hop.compute_ms) == (1.0, 2.0) for hop in answer.route)


@in_virtual_time
async def test_last_token_is_not_stepped_and_session_is_closed() -> None:
    async with toy_swarm(THREE) as toy:
        await toy.swarm.generate("hello", raw=True, max_new_tokens=4)
        assert [server.tokens_stepped for server in toy.servers.values()] == [5 + 3] * 3
        assert all(len(server.closed) == 1 for server in toy.servers.values())
        assert toy["a"].opened[0].max_tokens == 9


@in_virtual_time
async def test_times_are_the_networks() -> None:
    async with toy_swarm(THREE) as toy:
        for name in THREE:
            toy.network.set_link("client", toy[name].peer, latency=0.010)
        answer = await toy.swarm.generate("hello", raw=True, max_new_tokens=11, speculate=False)
    # opening takes two round trips (stream, Open) to all hops at once; the prompt one to each hop in turn,
    # while the hops are linked; from then on a step goes to the first hop and comes from the last
    assert answer.ttft_ms == pytest.approx(40 + 60, abs=0.01)
    assert answer.tokens_per_s == pytest.approx(1 / 0.020, rel=1e-6)
    assert [hop.rtt_ms for hop in answer.route] == pytest.approx([17.0, 0.0, 0.0], abs=0.01)


@in_virtual_time
async def test_without_push_each_step_goes_to_each_hop_in_turn() -> None:
    async with toy_swarm(THREE, sessions=SessionOptions(push=False)) as toy:
        for name in THREE:
            toy.network.set_link("client", toy[name].peer, latency=0.010)
        answer = await toy.swarm.generate("hello", raw=True, max_new_tokens=11, speculate=False)
    assert answer.tokens_per_s == pytest.approx(1 / 0.060, rel=1e-6)
    assert [hop.rtt_ms for hop in answer.route] == pytest.approx([17.0] * 3, abs=0.01)


@in_virtual_time
async def test_long_prompt_is_pipelined_in_chunks() -> None:
    async with toy_swarm(THREE) as toy:
        prompt = "x" * 200

        async def compute(_: int) -> None:
            await asyncio.sleep(1.0)

        for server in toy.servers.values():
            server.before_step = compute
        toy["b"].max_step_tokens = 50
        answer = await toy.swarm.generate(prompt, raw=True, max_new_tokens=1)
    # of the 50 tokens that b allows, whole pages
    assert toy["a"].steps == [(at, min(32, 200 - at)) for at in range(0, 200, 32)]
    assert list(answer.token_ids) == toy.ends.expected(list(prompt.encode()), 1)
    # seven chunks through three hops of a second each: nine seconds, where 21 would be one after another
    assert answer.ttft_ms == pytest.approx(9000)


@in_virtual_time
async def test_next_turn_steps_only_what_is_new() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=5)
        first = await chat.ask("hi").result()
        opening = len("u:hi\na:")
        assert toy["c"].tokens_stepped == opening + 4
        second = await chat.ask("and?").result()
        # the fifth token of the first answer was never stepped
        fresh = 1 + len("\nu:and?\na:")
        assert toy["c"].tokens_stepped == opening + 4 + fresh + 4
        assert len(toy["c"].opened) == 1
        whole = f"u:hi\na:{first.text}\nu:and?\na:".encode()
        assert list(second.token_ids) == toy.ends.expected(list(whole), 5)
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


@in_virtual_time
async def test_changed_history_rolls_back() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=3)
        await chat.ask("one two three").result()
        before = toy["a"].tokens_stepped
        chat.messages = []
        answer = await chat.ask("one two four").result()
        assert toy["a"].steps[-3][0] == len("u:one two ")
        assert toy["a"].tokens_stepped - before == len("four\na:") + 2
        assert list(answer.token_ids) == toy.ends.expected(list(b"u:one two four\na:"), 3)


@in_virtual_time
async def test_same_prompt_again_steps_its_last_token() -> None:
    async with toy_swarm(THREE) as toy:
        conversation = toy.swarm.conversation()
        for _ in range(2):
            hidden = (await conversation.begin(PROMPT, 1)).outcome
            assert hidden.tolist() == [[PROMPT[-1], 6, sum(PROMPT), len(PROMPT)]]
        assert toy["a"].steps == [(0, 19), (18, 1)]
        await conversation.close()


@in_virtual_time
async def test_outgrown_session_is_opened_anew_and_larger() -> None:
    async with toy_swarm(THREE) as toy:
        conversation = toy.swarm.conversation()
        await conversation.begin(PROMPT, 1)
        await conversation.begin(PROMPT * 2, 5)
        assert [asked.max_tokens for asked in toy["a"].opened] == [20, 43]
        assert toy["a"].steps == [(0, 19), (0, 38)]
        assert len(toy["a"].closed) == 1
        await conversation.close()


@in_virtual_time
async def test_idle_session_that_a_hop_closed_is_opened_anew() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=3)
        await chat.ask("hi").result()
        for stream in list(toy["b"].memory.streams):
            stream.close()
        await asyncio.sleep(0.1)
        answer = await chat.ask("more").result()
        assert len(toy["b"].opened) == 2
        assert answer.finish_reason == "length"


@in_virtual_time
async def test_eos_ends_and_is_reported_but_not_shown() -> None:
    async with toy_swarm(THREE, next_token=scripted(2, b"ok")) as toy:
        answer = await toy.swarm.generate("hi", raw=True)
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("ok", (111, 107, EOS), "stop")
        longer = await toy.swarm.generate("hi", raw=True, ignore_eos=True, max_new_tokens=5)
        assert (longer.text, longer.finish_reason) == ("ok", "length")
        assert longer.token_ids == (111, 107, EOS, EOS, EOS)


@in_virtual_time
async def test_stream_never_shows_half_a_character_nor_a_stop_string() -> None:
    text = "naïve 🦊 STOP never"
    async with toy_swarm(THREE, next_token=scripted(2, text.encode())) as toy:
        stream = toy.swarm.stream("hi", raw=True, stop=["STOP", "STOOP"])
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == "naïve 🦊 "
        assert "🦊" in pieces
        assert stream.generation is not None
        assert stream.generation.text == "naïve 🦊 "
        assert stream.generation.finish_reason == "stop"


@in_virtual_time
async def test_same_seed_samples_the_same() -> None:
    async with toy_swarm(THREE) as toy:
        toy.ends.logits = lambda hidden: torch.zeros(len(hidden), 200)  # type: ignore[method-assign]
        options: Any = {"raw": True, "temperature": 1.0, "max_new_tokens": 12, "top_k": 150}
        one, same, other = [
            (await toy.swarm.generate("hi", seed=seed, **options)).token_ids for seed in (5, 5, 6)
        ]
    assert one == same != other


@in_virtual_time
async def test_context_bounds_prompt_and_answer() -> None:
    async with toy_swarm(THREE, context=10) as toy:
        with pytest.raises(InputError, match=r"prompt has 10 tokens.* fewer than 10"):
            await toy.swarm.generate("x" * 10, raw=True)
        answer = await toy.swarm.generate("x" * 7, raw=True, max_new_tokens=50)
        assert (len(answer.token_ids), answer.finish_reason) == (3, "length")
        assert toy["a"].opened[0].max_tokens == 10


@in_virtual_time
async def test_wrong_input_says_so_before_any_hop_is_asked() -> None:
    async with toy_swarm(THREE) as toy:
        for options in ({"temperature": -1.0}, {"max_new_tokens": 0}, {"stop": ""}, {"top_p": 0.0}):
            with pytest.raises(InputError):
                toy.swarm.stream("hi", **options)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            toy.swarm.stream("hi", temprature=1)  # type: ignore[call-arg]
        with pytest.raises(InputError, match="empty"):
            await toy.swarm.generate("", raw=True)
        toy.ends.tokenizer.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            toy.swarm.stream("hi")
        assert not toy["a"].opened


@in_virtual_time
async def test_no_route_names_the_blocks_and_who_is_loading() -> None:
    heard: list[str] = []
    async with toy_swarm(
        THREE, timeout=7.0, announced=["a", "c"], on_waiting=lambda reason: heard.append(str(reason))
    ) as toy:
        await toy.announce("b", state="joining", progress=0.25)
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(
            NoRoute, match=r"No server serves blocks 2 to 3 of toy: b \(…\w{6}\) is loading"
        ) as caught:
            await toy.swarm.generate("hi", raw=True)
        assert loop.time() - started == pytest.approx(7.0, abs=0.01)
        assert caught.value.missing == (Span(2, 4),)
        assert "25% done" in caught.value.message
        assert heard


@in_virtual_time
async def test_a_route_that_comes_up_while_waiting_is_taken() -> None:
    async with toy_swarm(THREE, announced=["a", "c"]) as toy:
        asking = asyncio.create_task(toy.swarm.generate("hi", raw=True, max_new_tokens=2))
        await asyncio.sleep(5.0)
        await toy.announce("b")
        answer = await asking
        assert answer.finish_reason == "length"
        assert asyncio.get_running_loop().time() < 8.0


@in_virtual_time
async def test_full_server_is_passed_over_for_another() -> None:
    async with toy_swarm(REPLICA) as toy:
        for server in (toy["b"], toy["spare"]):
            server.refuse = [refusal("no_capacity", 5.0)]
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert answer.route[1].name in ("b", "spare")
        # both had no room: the first to be free again was waited for
        assert 5.0 <= asyncio.get_running_loop().time() < 7.0


@in_virtual_time
async def test_lasting_lack_of_room_is_no_route_with_its_reason() -> None:
    async with toy_swarm(THREE, timeout=4.0) as toy:
        toy["b"].refuse = [refusal("no_capacity", 60.0)] * 9
        with pytest.raises(NoRoute, match="has no room for another session"):
            await toy.swarm.generate("hi", raw=True)


@in_virtual_time
async def test_warming_up_step_is_repeated() -> None:
    async with toy_swarm(THREE) as toy:
        toy["b"].refuse_steps = [refusal("warming_up", 2.0)]
        answer = await toy.swarm.generate("hello", raw=True, max_new_tokens=3)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hello"), 3)
        assert asyncio.get_running_loop().time() >= 2.0


CODES = get_args(messages.ErrorCode)


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("code", CODES)
@in_virtual_time
async def test_a_hop_that_refuses_steps_is_replaced(code: messages.ErrorCode, count: int) -> None:
    async with toy_swarm(REPLICA) as toy:
        hop = toy.swarm.route().hops[1]
        toy[hop.announcement.name].refuse_steps = [refusal(code)] * count
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=4)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 4)
        assert answer.recoveries >= 1
        assert answer.route[1].peer != hop.peer or count == 1
        assert asyncio.get_running_loop().time() < 5.0


@pytest.mark.parametrize("code", CODES)
@in_virtual_time
async def test_a_hop_that_refuses_all_steps_and_has_no_other_is_an_error_in_time(
    code: messages.ErrorCode,
) -> None:
    async with toy_swarm(THREE, timeout=5.0) as toy:
        toy["b"].refuse_steps = [refusal(code)] * 1000
        with pytest.raises(SwarmError, match="blocks 2 to 3") as caught:
            await toy.swarm.generate("hi", raw=True)
        assert "\x1b" not in str(caught.value)
        assert asyncio.get_running_loop().time() < 20.0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out[:, :2],
        lambda out: np.concatenate([out, out]),
        lambda out: out * np.float32("nan"),
        lambda out: out + np.float32("inf"),
    ],
)
@in_virtual_time
async def test_nonsense_is_the_peers_fault_and_avoids_it(spoil: Any) -> None:
    async with toy_swarm(REPLICA) as toy:
        bad = toy[toy.swarm.route().hops[1].announcement.name]
        bad.spoil = spoil
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 2)
        assert answer.recoveries == 1
        assert answer.route[1].peer != bad.peer
        assert toy.swarm.route().hops[1].peer != bad.peer


@in_virtual_time
async def test_hop_that_dies_while_answering_is_replaced() -> None:
    async with toy_swarm(REPLICA) as toy:
        hop = toy.swarm.route().hops[1]
        doomed = toy[hop.announcement.name]

        async def die(steps: int) -> None:
            if steps == 4:
                doomed.kill()

        doomed.before_step = die
        chat = toy.swarm.chat(max_new_tokens=10)
        answer = await chat.ask("hi").result()
        assert list(answer.token_ids) == toy.ends.expected(list(b"u:hi\na:"), 10)
        assert (answer.recoveries, answer.route[1].peer != hop.peer) == (1, True)
        assert chat.messages[-1]["role"] == "assistant"
        assert (await chat.ask("hi").result()).recoveries == 0
        assert len(toy["a"].opened) == 1, "the other hops kept what they had"


@in_virtual_time
async def test_hop_that_dies_without_another_is_an_error_in_time() -> None:
    async with toy_swarm(THREE, timeout=8.0) as toy:

        async def die(steps: int) -> None:
            if steps == 4:
                toy["b"].kill()

        toy["b"].before_step = die
        chat = toy.swarm.chat(max_new_tokens=10)
        with pytest.raises(SwarmError, match=r"blocks 2 to 3"):
            await chat.ask("hi").result()
        assert 8.0 <= asyncio.get_running_loop().time() < 20.0
        assert chat.messages == []
        await toy["b"].revive()
        toy["b"].before_step = None
        assert (await chat.ask("hi").result()).finish_reason == "length"


@in_virtual_time
async def test_hop_that_hangs_is_given_up_after_the_deadline() -> None:
    deadlines = Deadlines(step=3.0, step_token=0.5)
    async with toy_swarm(REPLICA, deadlines=deadlines) as toy:
        hop = toy.swarm.route().hops[1]
        toy[hop.announcement.name].before_step = lambda steps: asyncio.sleep(1e6)
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 2)
        assert (answer.recoveries, answer.route[1].peer != hop.peer) == (1, True)
        assert 4.0 <= asyncio.get_running_loop().time() < 30.0


@in_virtual_time
async def test_hop_that_hangs_at_opening_leads_to_another_route() -> None:
    async with toy_swarm(REPLICA) as toy:
        hop = toy.swarm.route().hops[1]
        toy.network.partition({"client"}, {toy[hop.announcement.name].identity})
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert answer.route[1].peer != hop.peer


@in_virtual_time
async def test_own_network_failure_blames_no_peer() -> None:
    async with toy_swarm(THREE) as toy:

        async def fail(steps: int) -> None:
            toy.network.kill("client")
            await asyncio.sleep(1.0)

        toy["b"].before_step = fail
        with pytest.raises(TransportError):
            await toy.swarm.generate("hi", raw=True)


@pytest.mark.parametrize("ticks", range(0, 66, 3))
@in_virtual_time
async def test_cancelled_anywhere_frees_the_hops(ticks: int) -> None:
    async with toy_swarm(THREE) as toy:
        for name in THREE:
            toy.network.set_link("client", toy[name].peer, latency=0.010)
        chat = toy.swarm.chat(max_new_tokens=14, speculate=False)
        asking = asyncio.create_task(chat.ask("hi").result())
        await asyncio.sleep(ticks * 0.005)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert chat.session is None or chat.session.is_open
        assert chat.messages == []
        answer = await chat.ask("hi").result()
        assert list(answer.token_ids) == toy.ends.expected(list(b"u:hi\na:"), 14)
        await chat.close()
        await asyncio.sleep(0.1)
        assert not any(toy.sessions.values())


@in_virtual_time
async def test_stop_keeps_session_and_partial_answer() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=50)
        stream = chat.ask("hi")
        shown = ""
        async for piece in stream:
            shown += piece
            if len(shown) == 3:
                stream.stop()
        assert stream.generation is not None
        assert (stream.generation.finish_reason, stream.generation.text) == ("cancelled", shown)
        assert chat.messages[-1] == {"role": "assistant", "content": shown}
        assert chat.session is not None
        stepped = toy["a"].tokens_stepped
        await chat.ask("go on").result()
        assert len(toy["a"].opened) == 1
        assert toy["a"].tokens_stepped - stepped < len("\nu:go on\na:") + 1 + 50


@in_virtual_time
async def test_abandoned_stream_is_superseded_by_the_next() -> None:
    async with toy_swarm(THREE) as toy:
        chat = toy.swarm.chat(max_new_tokens=5)
        first = chat.ask("hi")
        async for _ in first:
            break
        answer = await chat.ask("hi").result()
        assert len(answer.token_ids) == 5
        await first.aclose()
        assert chat.session is not None


@in_virtual_time
async def test_scaled_float16_between_hops() -> None:
    async with toy_swarm(THREE) as toy:
        toy["b"].dtype, toy["b"].codec = "float16", "scaled"
        answer = await toy.swarm.generate("hi", raw=True, max_new_tokens=2)
        assert list(answer.token_ids) == toy.ends.expected(list(b"hi"), 2)
        fed = {(step.dtype, step.codec) for step in toy["b"].received}
        assert fed == {("float16", "scaled")}
        assert {(step.dtype, step.codec) for step in toy["c"].received} == {("float32", "raw")}


@in_virtual_time
async def test_peers_report() -> None:
    async with toy_swarm(THREE) as toy:
        await toy.swarm.wait_for_route()
        reports = [report.as_json() for report in toy.swarm.peers()]
    assert [report["blocks"] for report in reports] == [[0, 2], [2, 4], [4, 6]]
    assert set(reports[0]) == {
        *("peer", "name", "model", "state", "blocks", "progress", "asleep"),
        *("throughput", "kv_tokens_left", "rtt_ms", "version"),
    }
    assert reports[0]["rtt_ms"] is not None


@in_virtual_time
async def test_json_of_an_answer_keeps_the_contract() -> None:
    async with toy_swarm(THREE) as toy:
        found = (await toy.swarm.generate("hi", raw=True, max_new_tokens=2)).as_json()
    assert set(found) >= {"text", "token_ids", "usage", "timing", "route", "recoveries"}
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}
    assert set(found["timing"]) == {"ttft_ms", "tokens_per_s"}
    assert set(found["route"][0]) == {"peer", "blocks", "rtt_ms", "compute_ms", "queue_ms"}
    assert found["route"][2]["blocks"] == [4, 6]


@pytest.mark.parametrize(("latency", "moves"), [(0.01, True), (0.19, False)])
@in_virtual_time
async def test_a_chat_moves_between_turns_if_another_route_is_clearly_better(
    latency: float, moves: bool
) -> None:
    async with toy_swarm({"far": Span(0, 6), "near": Span(0, 6)}, announced=["far"]) as toy:
        toy.network.set_link("client", toy["far"].peer, latency=0.2)
        toy.network.set_link("client", toy["near"].peer, latency=latency)
        await toy.swarm.wait_for_route()
        chat = toy.swarm.chat(max_new_tokens=40)
        first = await chat.ask("hi").result()
        await toy.announce("near")
        await asyncio.sleep(20.0)
        second = await chat.ask("and?").result()
        whole = f"u:hi\na:{first.text}\nu:and?\na:".encode()
        assert list(second.token_ids) == toy.ends.expected(list(whole), 40)
        assert [hop.name for hop in first.route] == ["far"]
        assert [hop.name for hop in second.route] == ["near" if moves else "far"]
        assert len(toy["far"].closed) == moves
        await chat.close()
