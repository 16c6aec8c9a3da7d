"""Servers that do not let a client in, or do not go to each other: answers go round them, or say so."""

import asyncio
from pathlib import Path

import pytest

from swarm.client.faults import NotAdmittedThere
from swarm.net.door import Door
from swarm.net.memory import MemoryTransport
from swarm.net.peer_lists import PeerLists
from swarm.net.virtual_time import in_virtual_time
from swarm.spans import Span
from tests.toy_swarm import ToyServer, identity_of, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
REPLICA = {**THREE, "spare": Span(2, 4)}
PROMPT = "hello"


def turn_away(server: ToyServer, *peers: str) -> None:
    server.memory.door.admits = lambda peer: peer not in peers  # type: ignore[method-assign]


@in_virtual_time
async def test_a_client_that_is_turned_away_is_told_whom_to_ask() -> None:
    async with toy_swarm(THREE) as toy:
        client = toy.network.peer("client")
        turn_away(toy["b"], client)
        began = asyncio.get_running_loop().time()
        with pytest.raises(NotAdmittedThere) as refusal:
            await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=4)
        assert asyncio.get_running_loop().time() - began < 10
        assert "serves blocks 2 to 3, does not let this client in" in refusal.value.message
        assert client in refusal.value.message
        assert "--identity" in refusal.value.hint
        assert not toy["b"].opened


@in_virtual_time
async def test_answers_go_round_who_turns_this_client_away() -> None:
    async with toy_swarm(REPLICA) as toy:
        turn_away(toy["b"], toy.network.peer("client"))
        answer = await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=4)
        assert list(answer.token_ids) == toy.ends.expected(list(PROMPT.encode()), 4)
        assert toy["spare"].opened
        assert not toy["b"].opened


@pytest.mark.parametrize("where", ["in", "out"])
@in_virtual_time
async def test_servers_that_have_nothing_to_do_with_each_other_are_served_by_the_client(
    where: str, tmp_path: Path
) -> None:
    async with toy_swarm(THREE) as toy:
        if where == "in":
            turn_away(toy["b"], toy["a"].peer)
        else:
            block = tmp_path / "block"
            block.write_text(toy["b"].peer)
            toy["a"].memory.door = Door(lists=PeerLists(block=block))
        answer = await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=12)
        assert list(answer.token_ids) == toy.ends.expected(list(PROMPT.encode()), 12)
        assert answer.recoveries == 0
        if where == "out":
            await toy["a"].memory.door.close()


@in_virtual_time
async def test_a_client_goes_round_whom_its_own_list_blocks(tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.write_text(identity_of("b").peer)

    def with_list(transport: MemoryTransport) -> MemoryTransport:
        if transport.peer not in {identity_of(name).peer for name in REPLICA}:
            transport.door = Door(lists=PeerLists(block=block))
        return transport

    async with toy_swarm(REPLICA, wrap=with_list) as toy:
        answer = await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=4)
        assert not toy["b"].opened
        assert list(answer.token_ids) == toy.ends.expected(list(PROMPT.encode()), 4)
