"""What hops have kept is not computed again: keys of pages, token ids, and who may find what.

A toy server keeps the tokens that are in a page, and accepts a key for one content only, so that every
exact answer here also says that the keys were right.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from swarm.client.facade import Swarm
from swarm.client.generation import Generation
from swarm.client.options import GenerationOptions
from swarm.client.page_chain import PageChain, chain_for
from swarm.client.relay import chunk_edges
from swarm.client.route import Hop
from swarm.dht.announcement import Announcement
from swarm.errors import SwarmError
from swarm.net.identity import Identity
from swarm.net.messages import MAX_PAGE_KEYS
from swarm.net.transport import PeerId
from swarm.net.virtual_time import in_virtual_time
from swarm.page_keys import KEY_BYTES, page_keys
from swarm.spans import Span
from tests.toy_swarm import EOS, Toy, letters, toy_swarm

THREE = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
SYSTEM = [65 + at % 26 for at in range(70)]
"""A prompt of two pages and six tokens."""


async def answer(swarm: Swarm, prompt: Sequence[int], count: int = 4) -> Generation:
    return await swarm.stream_tokens(prompt, GenerationOptions(max_new_tokens=count)).result()


def assert_exact(toy: Toy, prompt: Sequence[int], found: Generation) -> None:
    assert list(found.token_ids) == toy.ends.expected(prompt, len(found.token_ids))


@in_virtual_time
async def test_second_session_skips_what_the_first_has_filled() -> None:
    async with toy_swarm(THREE) as toy:
        first = await answer(toy.swarm, SYSTEM)
        assert first.as_json()["usage"]["cached_tokens"] == 0
        for server in toy.servers.values():
            server.steps.clear()
        prompt = [*SYSTEM, 1, 2, 3]
        second = await answer(toy.swarm, prompt)
        assert_exact(toy, prompt, second)
        assert second.as_json()["usage"]["cached_tokens"] == 64
        for server in toy.servers.values():
            assert server.steps == [(64, 9), (73, 1), (74, 1), (75, 1)]


@in_virtual_time
async def test_second_chat_turn_in_a_new_session_steps_only_what_is_new() -> None:
    async with toy_swarm(THREE) as toy:
        said = await answer(toy.swarm, SYSTEM, 60)
        # 129 tokens were stepped, so four pages are full: two of them, and a half, by decoding
        turn = [*SYSTEM, *said.token_ids, 10, 11, 12]
        conversation = toy.swarm.conversation()
        begun = await conversation.begin(turn, 8)
        assert begun.cached_tokens == 128
        assert conversation.stepped == len(turn) - 128
        assert begun.outcome.tolist() == [[12, 6, sum(turn), len(turn)]]
        await conversation.close()


@in_virtual_time
async def test_the_whole_prompt_is_held_but_its_last_token_is_stepped() -> None:
    async with toy_swarm(THREE) as toy:
        for cached in (0, 63):
            found = await answer(toy.swarm, SYSTEM[:64])
            assert_exact(toy, SYSTEM[:64], found)
            assert found.cached_tokens == cached


@in_virtual_time
async def test_the_hop_that_holds_least_decides() -> None:
    async with toy_swarm(THREE) as toy:
        await answer(toy.swarm, SYSTEM)
        server = toy["b"]
        server.pages = dict(list(server.pages.items())[:1])
        found = await answer(toy.swarm, SYSTEM)
        assert found.cached_tokens == 32
        assert_exact(toy, SYSTEM, found)
        # what the least one lacked is named again, by the same keys: now all hold it
        assert (await answer(toy.swarm, SYSTEM)).cached_tokens == 64


@in_virtual_time
async def test_hop_that_takes_no_ids_is_given_hidden_states_and_finds_them_again() -> None:
    async with toy_swarm(THREE) as toy:
        toy["a"].takes_token_ids = False
        for cached in (0, 64):
            found = await answer(toy.swarm, SYSTEM)
            assert found.cached_tokens == cached
            assert_exact(toy, SYSTEM, found)
        assert {step.payload_type for step in toy["a"].received} == {"hidden_states"}


@in_virtual_time
async def test_the_first_hop_gets_token_ids_and_the_others_names() -> None:
    async with toy_swarm(THREE) as toy:
        embeds: list[int] = []
        embed = toy.ends.embed
        toy.ends.embed = lambda ids: embeds.append(len(ids)) or embed(ids)  # type: ignore[method-assign, func-returns-value]
        found = await answer(toy.swarm, SYSTEM)
        assert_exact(toy, SYSTEM, found)
        assert not embeds
        first = toy["a"].received
        assert {(step.payload_type, step.dtype, len(step.shape)) for step in first} == {
            ("token_ids", "uint32", 1)
        }
        assert all(not step.page_keys for step in first)
        assert toy["a"].opened[0].page_keys == page_keys(SYSTEM)
        named = b"".join(step.page_keys for step in toy["b"].received)
        assert named == toy["b"].opened[0].page_keys
        assert {step.payload_type for step in toy["b"].received} == {"hidden_states"}


@in_virtual_time
async def test_pages_of_seen_tokens_are_everybodys_and_the_others_are_not() -> None:
    async with toy_swarm(THREE) as toy:
        await answer(toy.swarm, SYSTEM)
        other = await toy.join("another client")
        found = await answer(other, SYSTEM)
        # the first hop shares its pages, but the others have none of this client
        assert found.cached_tokens == 0
        assert_exact(toy, SYSTEM, found)
        mine, theirs = (opened.page_keys for opened in toy["a"].opened)
        assert mine == theirs
        for name in ("b", "c"):
            mine, theirs = (opened.page_keys for opened in toy[name].opened)
            assert len(mine) == len(theirs) == 2 * KEY_BYTES
            assert mine[:KEY_BYTES] != theirs[:KEY_BYTES] != page_keys(SYSTEM)[:KEY_BYTES]
        assert (await answer(other, SYSTEM)).cached_tokens == 64


@in_virtual_time
async def test_the_same_identity_finds_its_pages_again_in_another_process() -> None:
    async with toy_swarm(THREE) as toy:
        await answer(toy.swarm, SYSTEM)
        await toy.swarm.close()
        await toy.swarm._transport.close()
        assert (await answer(await toy.join("client"), SYSTEM)).cached_tokens == 64


@in_virtual_time
async def test_hops_after_another_peer_do_not_take_what_it_never_sent() -> None:
    async with toy_swarm({**THREE, "spare": Span(2, 4)}) as toy:
        first = await answer(toy.swarm, SYSTEM)
        used, other = (toy[name] for name in ("b", "spare"))
        if first.route[1].name == "spare":
            used, other = other, used
        await toy.announce(used.name, state="draining")
        await toy.swarm.directory.refresh()
        found = await answer(toy.swarm, SYSTEM)
        assert found.route[1].name == other.name
        assert found.cached_tokens == 0
        before, after = (opened.page_keys for opened in toy["c"].opened)
        assert before != after
        assert (await answer(toy.swarm, SYSTEM)).cached_tokens == 64


@pytest.mark.parametrize("claims", [96, 65, 2**31])
@in_virtual_time
async def test_hop_that_claims_more_than_it_was_asked_for_is_at_fault(claims: int) -> None:
    async with toy_swarm(THREE, timeout=1.0) as toy:
        toy["b"].claims = claims
        with pytest.raises(SwarmError, match=r"b \(.* holds more of a new session than it was asked for"):
            await answer(toy.swarm, SYSTEM)
        assert not toy["b"].steps


@in_virtual_time
async def test_rollback_names_the_pages_of_what_came_instead() -> None:
    async with toy_swarm(THREE) as toy:
        conversation = toy.swarm.conversation(room=300)
        options = GenerationOptions(max_new_tokens=30)
        for edited in (SYSTEM, [*SYSTEM[:40], 7, *SYSTEM[41:]], [*SYSTEM[:64], 9], SYSTEM[:33], SYSTEM):
            found = await toy.swarm.stream_tokens(edited, options, conversation).result()
            assert_exact(toy, edited, found)
        assert len(toy["a"].opened) == 1
        await conversation.close()
        for prompt, cached in ((SYSTEM, 64), ([*SYSTEM[:40], 7, *SYSTEM[41:]], 64), ([*SYSTEM[:32], 1], 32)):
            found = await answer(toy.swarm, prompt)
            assert_exact(toy, prompt, found)
            assert found.cached_tokens == cached


@in_virtual_time
async def test_pipelined_chunks_are_named_whole() -> None:
    prompt = [at % 251 for at in range(500)]
    async with toy_swarm(THREE) as toy:
        for server in toy.servers.values():
            server.max_step_tokens = 1000
        for cached in (0, 480):
            found = await answer(toy.swarm, prompt)
            assert_exact(toy, prompt, found)
            assert found.cached_tokens == cached
        assert toy["b"].steps[:4] == [(0, 128), (128, 128), (256, 128), (384, 116)]


@in_virtual_time
async def test_steps_shorter_than_a_page_fill_pages_too() -> None:
    async with toy_swarm(THREE) as toy:
        toy["c"].max_step_tokens = 20
        for cached in (0, 64):
            found = await answer(toy.swarm, SYSTEM)
            assert_exact(toy, SYSTEM, found)
            assert found.cached_tokens == cached


@pytest.mark.parametrize(
    ("start", "end", "size", "edges"),
    [
        (0, 300, 128, [0, 128, 256, 300]),
        (0, 256, 128, [0, 128, 256]),
        (50, 300, 128, [50, 160, 288, 300]),
        (50, 300, 100, [50, 128, 224, 300]),
        (10, 45, 20, [10, 30, 45]),
        (63, 64, 2048, [63, 64]),
        (31, 65, 32, [31, 32, 64, 65]),
    ],
)
def test_chunks_end_where_pages_do(start: int, end: int, size: int, edges: list[int]) -> None:
    assert chunk_edges(start, end, size) == edges
    assert all(later - earlier <= size for earlier, later in pairwise(edges))


def test_a_chain_grows_and_is_cut_with_its_sequence() -> None:
    tokens = list(range(200))
    chain = PageChain(b"secret")
    whole = page_keys(tokens, secret=b"secret")
    assert chain.named(tokens, 0, 70) == whole[: 2 * KEY_BYTES]
    assert chain.named(tokens, 70, 71) == b""
    assert chain.named(tokens, 71, 200) == whole[2 * KEY_BYTES :]
    changed = [*tokens[:40], 0, *tokens[41:]]
    again = chain.named(changed, 40, 200)
    assert again == page_keys(changed, secret=b"secret")[KEY_BYTES:]
    assert again[:KEY_BYTES] != whole[KEY_BYTES : 2 * KEY_BYTES]


def test_no_more_keys_are_asked_than_a_message_takes() -> None:
    tokens = [0] * (MAX_PAGE_KEYS * 32 + 64)
    assert len(PageChain(b"").asked(tokens)) == MAX_PAGE_KEYS * KEY_BYTES


def test_keys_stand_for_who_knows_them_and_for_what_came_before() -> None:
    def hop(peer: str, span: Span, dtype: str = "float32") -> Hop:
        said = Announcement(
            peer=peer, model_id="m", start=span.start, end=span.end, state="serving", dtype=dtype
        )
        return Hop(PeerId(peer), span, said)

    first, last = hop("a", Span(0, 2)), hop("c", Span(2, 4))
    tokens = list(range(32))
    routes = {
        "plain": ([first, last], b"mine"),
        "other client": ([first, last], b"other"),
        "other first peer": ([hop("b", Span(0, 2)), last], b"mine"),
        "other dtype before": ([hop("a", Span(0, 2), "int8"), last], b"mine"),
        "other blocks": ([hop("a", Span(0, 2)), hop("c", Span(2, 3))], b"mine"),
    }
    keys = {name: chain_for(*route).asked(tokens) for name, route in routes.items()}
    assert len(set(keys.values())) == len(routes)
    assert chain_for(*routes["plain"]).asked(tokens) == keys["plain"]
    assert chain_for([first], b"mine").asked(tokens) == page_keys(tokens)


def test_the_secret_of_an_identity_is_stable_and_its_own(tmp_path: object) -> None:
    path = f"{tmp_path}/key"
    mine = Identity.load_or_create(path)
    assert mine.secret("page keys") == Identity.load(path).secret("page keys")
    others = {mine.secret("page keys"), mine.secret("else"), Identity.generate().secret("page keys")}
    assert len(others) == 3
    assert all(len(secret) == 32 for secret in others)


@in_virtual_time
async def test_the_last_hop_tells_the_likeliest_token_where_that_is_wanted() -> None:
    async with toy_swarm(THREE) as toy:
        toy["c"].tells = letters
        logits: list[int] = []
        apply_head = toy.ends.logits
        toy.ends.logits = lambda hidden: logits.append(len(hidden)) or apply_head(hidden)  # type: ignore[method-assign, func-returns-value]
        assert_exact(toy, SYSTEM, await answer(toy.swarm, SYSTEM))
        assert not logits, "the client has no need of its head"
        first, *others = toy["c"].received
        assert (first.response_type, first.rows) == ("hidden_states", 1), (
            "no more of the first part is needed"
        )
        assert {step.response_type for step in others} == {"token_ids"}
        assert {step.response_type for step in toy["b"].received} == {"hidden_states"}
        toy["c"].received.clear()
        stream = toy.swarm.conversation()
        await stream.begin(SYSTEM, 4)
        assert {step.response_type for step in toy["c"].received} == {"hidden_states"}


@in_virtual_time
async def test_a_token_that_the_model_does_not_have_is_a_fault() -> None:
    async with toy_swarm({**THREE, "spare": Span(4, 6)}) as toy:
        liar = toy[toy.swarm.route().hops[2].announcement.name]
        liar.tells = lambda total, count: EOS + 1
        found = await answer(toy.swarm, SYSTEM)
        assert_exact(toy, SYSTEM, found)
        assert (found.recoveries, found.route[2].name != liar.name) == (1, True)
