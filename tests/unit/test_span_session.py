"""Sessions on a part of the blocks, given hidden states: exact whatever is lost, and nothing is left."""

import asyncio

import pytest
import torch
from torch import Tensor

from swarm.client.options import SessionOptions
from swarm.client.relay import HistoryLost
from swarm.client.span_session import SpanSession
from swarm.errors import InputError, SwarmError
from swarm.net.messages import Step
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.faulty import Faults
from tests.toy_swarm import Toy
from tests.trial import SIX, THREE, trial

TOKENS = [65 + at % 26 for at in range(80)]


def states(toy: Toy, block: int, first: int = 0, tokens: list[int] = TOKENS) -> Tensor:
    """What `block` takes at the positions of `tokens` from `first` on, [tokens, hidden]."""
    ids = torch.tensor(tokens, dtype=torch.float32)
    counts = torch.arange(1.0, len(ids) + 1)
    if block == 0:
        return toy.ends.embed(torch.tensor(tokens))[first:]
    return torch.stack([ids, torch.full_like(ids, block), ids.cumsum(0), counts], dim=1)[first:]


@pytest.mark.parametrize("span", [Span(0, 6), Span(0, 2), Span(1, 5), Span(3, 4), Span(5, 6)])
@in_virtual_time
async def test_any_part_of_the_blocks_runs_alone(span: Span) -> None:
    async with trial(THREE, Faults(0)) as toy:
        session = await toy.swarm.open_span_session(span, len(TOKENS))
        given = states(toy, span.start)
        first, second = await session.step(given[:50]), await session.step(given[50:])
        assert torch.equal(torch.cat([first, second]), states(toy, span.end))
        hops = session.session.route.hops
        assert Span(hops[0].span.start, hops[-1].span.end) == span
        await session.close()


@in_virtual_time
async def test_what_is_asked_of_servers_tells_no_tokens() -> None:
    async with trial(THREE, Faults(0)) as toy:
        session = await toy.swarm.open_span_session(Span(0, 6), len(TOKENS))
        await session.step(states(toy, 0))
        await session.close()
        for server in toy.servers.values():
            assert not any(opened.page_keys for opened in server.opened)
            assert {(step.payload_type, step.page_keys) for step in server.received} <= {
                ("hidden_states", b"")
            }
        assert [step for step in toy["a"].received if isinstance(step, Step)]
        assert not toy["a"].pages, "pages of unknown tokens are kept for nobody"


@in_virtual_time
async def test_going_back_forgets_what_came_after() -> None:
    async with trial(THREE, Faults(0)) as toy:
        session = await toy.swarm.open_span_session(Span(1, 5), len(TOKENS))
        await session.step(states(toy, 1))
        session.position = 30
        other = [*TOKENS[:30], *reversed(TOKENS[30:])]
        assert torch.equal(await session.step(states(toy, 1, 30, other)), states(toy, 5, 30, other))
        with pytest.raises(InputError, match="position 81"):
            session.position = 81
        with pytest.raises(InputError, match="room for 0 more"):
            await session.step(states(toy, 1)[:1])
        await session.close()


@pytest.mark.parametrize("span", [Span(0, 6), Span(1, 5), Span(2, 4)])
@pytest.mark.parametrize("lost", ["first", "all"])
@in_virtual_time
async def test_lost_hops_are_replaced_from_the_journal(span: Span, lost: str) -> None:
    async with trial(SIX, Faults(0)) as toy:
        session = await toy.swarm.open_span_session(span, len(TOKENS))
        given = states(toy, span.start)
        before = await session.step(given[:70])
        hops = session.session.route.hops
        for hop in hops[:1] if lost == "first" else hops:
            toy[hop.announcement.name].kill()
        after = await session.step(given[70:])
        assert torch.equal(torch.cat([before, after]), states(toy, span.end))
        assert session.session.replayed_tokens >= 70
        await session.close()


@in_virtual_time
async def test_a_journal_without_room_is_said_to_be() -> None:
    nothing = SessionOptions(journal_memory=0, journal_disk=0)
    async with trial(SIX, Faults(0), sessions=nothing) as toy:
        session = await toy.swarm.open_span_session(Span(1, 5), len(TOKENS))
        given = states(toy, 1)
        assert torch.equal(await session.step(given[:70]), states(toy, 5)[:70])
        toy[session.session.route.hops[0].announcement.name].kill()
        with pytest.raises(HistoryLost, match="journal_memory"):
            await session.step(given[70:])
        with pytest.raises(SwarmError, match="has ended"):
            await session.step(given[70:])


@pytest.mark.parametrize("span", [Span(0, 0), Span(4, 2), Span(3, 7), Span(-1, 2)])
@in_virtual_time
async def test_blocks_that_are_not_there_are_refused(span: Span) -> None:
    async with trial(THREE, Faults(0)) as toy:
        with pytest.raises(InputError, match="no blocks"):
            await toy.swarm.open_span_session(span, 10)
        with pytest.raises(InputError, match="5000 tokens"):
            await toy.swarm.open_span_session(Span(0, 6), 5000)


@in_virtual_time
async def test_a_step_that_is_given_up_ends_the_session() -> None:
    async with trial(THREE, Faults(0)) as toy:
        session: SpanSession = await toy.swarm.open_span_session(Span(0, 6), len(TOKENS))
        task = asyncio.create_task(session.step(states(toy, 0)))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not session.session.is_open
