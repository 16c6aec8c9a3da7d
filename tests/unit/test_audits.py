"""Audits in the toy swarm: who is caught, who is left in peace, and what a session does about it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from swarm.client.auditor import Counts
from swarm.client.evidence import load
from swarm.client.options import SessionOptions
from swarm.client.route import NoRoute
from swarm.client.sensitivity import Sensitivity
from swarm.dht.announcement import Throughput
from swarm.errors import InputError
from swarm.net.messages import AnyMessage, Closed, Opened, Result
from swarm.net.virtual_time import in_virtual_time
from swarm.net.vouchers import Voucher
from swarm.spans import Span
from tests.toy_swarm import Toy, identity_of, letters, toy_swarm

ENDS = {"a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6)}
ALL = SessionOptions(audit_rate=1.0)
PROMPT = "abcdefgh" * 5


@pytest.fixture(autouse=True)
def jitter_of_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy engines compute with whole numbers: what this moves, they round back."""
    monkeypatch.setattr("swarm.client.sensitivity.JITTER", 1e-5)


def spans(*more: str) -> dict[str, Span]:
    """The three that serve, and others: each holds what the first letter of its name does."""
    return ENDS | {name: ENDS[name[0]] for name in more}


def shifted(hidden: np.ndarray) -> np.ndarray:
    """A lie that nobody sees: another sum, so another token."""
    hidden[:, 2] += 100
    return hidden


async def prefer(toy: Toy, *names: str) -> None:
    """Let routes lead through these."""
    for name in toy.servers:
        await toy.announce(name, throughput=Throughput(decode=1000.0 if name in names else 10.0))
    await toy.swarm.directory.refresh()


async def ask(toy: Toy, prompt: str = PROMPT, tokens: int = 8, **options: Any) -> list[int]:
    answer = await toy.swarm.generate(prompt, raw=True, max_new_tokens=tokens, **options)
    await toy.swarm.settle_audits()
    return list(answer.token_ids)


def has_caught(toy: Toy, name: str) -> bool:
    """Whether no route leads there any more."""
    try:
        hops = toy.swarm.route().hops
    except NoRoute as none:
        return "was caught giving wrong results" in str(none)
    return toy[name].peer not in {hop.peer for hop in hops}


@in_virtual_time
async def test_honest_hops_are_found_to_agree() -> None:
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        assert await ask(toy) == toy.ends.expected(list(PROMPT.encode()), 8)
        assert toy.swarm.audits == Counts(agreed=3)
        replays = [asked for server in toy.servers.values() for asked in server.opened[:]]
        assert sum(asked.priority == "bulk" for asked in replays) == 3


@pytest.mark.parametrize("stop", [None, "q"])
@in_virtual_time
async def test_honest_hops_that_go_by_themselves_are_found_to_agree(
    stop: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audited while they go on, and at the end of an answer that they do not know to be over."""
    monkeypatch.setattr("swarm.client.scrutiny.FIRST_AUDIT", 8)
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        for server in toy.servers.values():
            server.tells = letters
        expected = toy.ends.expected(list(PROMPT.encode()), 90)
        found = await ask(toy, tokens=90, speculate=False, stop=[stop] if stop else [])
        assert found == expected[: len(found)]
        assert len(found) == 90 or stop
        audits = toy.swarm.audits
        assert audits == Counts(agreed=audits.agreed)
        assert audits.agreed >= 3


@pytest.mark.parametrize("tells", [None, letters])
@in_virtual_time
async def test_a_liar_is_caught_by_two_others_and_left_out(tells: Any, tmp_path: Path) -> None:
    """The last hop gives wrong hidden states, or where it `tells` tokens wrong ones."""
    options = SessionOptions(audit_rate=1.0, evidence_folder=tmp_path)
    async with toy_swarm(spans("c2", "c3"), sessions=options, identity=identity_of("client")) as toy:
        for name in ("c", "c2", "c3"):
            toy[name].tells = tells
        await prefer(toy, "a", "b", "c")
        toy["c"].spoil = shifted
        assert await ask(toy) != toy.ends.expected(list(PROMPT.encode()), 8)
        assert toy.swarm.audits.caught == 1
        assert has_caught(toy, "c")
        assert await ask(toy) == toy.ends.expected(list(PROMPT.encode()), 8)
        [file] = os.listdir(tmp_path)
        assert os.stat(tmp_path / file).st_mode & 0o777 == 0o600
        voucher = load(tmp_path / file).checked()
        assert voucher.peer == toy["c"].peer
        assert voucher.kind == ("hidden_states" if tells is None else "token_ids")


@in_virtual_time
async def test_a_lying_witness_gets_no_honest_hop_blamed() -> None:
    async with toy_swarm(spans("c2", "c3"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c2"].spoil = shifted
        for _ in range(6):
            await ask(toy)
        assert toy.swarm.audits.caught == 1
        assert not has_caught(toy, "c")
        assert toy.swarm.audits.unclear == 0


@in_virtual_time
async def test_of_two_that_differ_nobody_is_caught() -> None:
    async with toy_swarm(spans("c2"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c"].spoil = shifted
        await ask(toy)
        assert toy.swarm.audits == Counts(unclear=1, unchecked=2)
        assert not has_caught(toy, "c")


@in_virtual_time
async def test_where_nobody_else_holds_anything_sessions_are_not_audited() -> None:
    async with toy_swarm(spans(), sessions=ALL) as toy:
        await ask(toy)
        assert toy.swarm.audits == Counts()


@in_virtual_time
async def test_a_running_session_goes_on_without_the_liar_and_what_came_of_its_lies() -> None:
    async with toy_swarm(spans("c2", "c3"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c"].spoil = shifted
        chat = toy.swarm.chat(max_new_tokens=4)
        await chat.ask("hi").result()
        session = chat.session
        assert session is not None
        await ask(toy)  # another session, at whose end the liar is caught
        assert has_caught(toy, "c")
        second = await chat.ask("and?").result()
        whole = "".join(f"{one['role'][0]}:{one['content']}\n" for one in chat.messages[:-1]) + "a:"
        assert list(second.token_ids) == toy.ends.expected(list(whole.encode()), 4)
        assert toy[name_of(toy, second.route[-1].peer)] is not toy["c"]
        await chat.close()


def name_of(toy: Toy, peer: str) -> str:
    return next(name for name, server in toy.servers.items() if server.peer == peer)


class AnotherText:
    """Hidden states of the same sequence, but with each token one higher: nobody can tell by themselves."""

    rows = 0

    def __call__(self, body: memoryview) -> bytes:
        hidden = np.frombuffer(body, np.float32).reshape(-1, 4).copy()
        hidden[:, 0] += 1
        hidden[:, 2] += np.arange(1, len(hidden) + 1) + self.rows
        self.rows += len(hidden)
        return hidden.tobytes()


@in_virtual_time
async def test_who_was_fed_something_else_is_not_taken_for_a_liar() -> None:
    """`b` pushes to `c` what it does not tell the client: who of the two lies, nobody can know."""
    async with toy_swarm(spans("c2", "c3", "b2", "b3"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c"].fed = AnotherText()
        assert await ask(toy) != toy.ends.expected(list(PROMPT.encode()), 8)
        assert toy.swarm.audits.caught == 0
        assert toy.swarm.audits.unclear == 1
        assert not toy.swarm._routes.may_push(toy["b"].peer, toy["c"].peer)
        await prefer(toy, "a", "b", "c")
        assert await ask(toy) == toy.ends.expected(list(PROMPT.encode()), 8), "it comes from the client now"


@in_virtual_time
async def test_who_was_brought_another_token_than_was_told_is_not_taken_for_a_liar() -> None:
    """`c` begins further rounds at `a` with tokens that it does not tell the client."""
    async with toy_swarm(spans("a2", "a3"), sessions=ALL) as toy:
        for server in toy.servers.values():
            server.tells = letters
        await prefer(toy, "a", "b", "c")
        toy["a"].fed = lambda body: (np.frombuffer(body, np.uint32) + 1).tobytes()
        expected = toy.ends.expected(list(PROMPT.encode()), 8)
        assert await ask(toy, speculate=False) != expected
        assert toy.swarm.audits == Counts(agreed=0, unclear=1, unchecked=2)
        assert not toy.swarm._routes.may_push(toy["c"].peer, toy["a"].peer)
        await prefer(toy, "a", "b", "c")
        assert await ask(toy, speculate=False) == expected, "the client brings each token now"


def quiet(message: AnyMessage) -> AnyMessage:
    """As a server of an older version, which knows of no vouchers."""
    if isinstance(message, Opened):
        return msgspec.structs.replace(message, vouches=False)
    if isinstance(message, Result):
        return msgspec.structs.replace(message, vouchers=())
    if isinstance(message, Closed):
        return msgspec.structs.replace(message, voucher=None)
    return message


@pytest.mark.parametrize("push", [True, False])
@in_virtual_time
async def test_who_does_not_vouch_is_audited_where_the_client_knows_what_it_was_brought(
    push: bool, tmp_path: Path
) -> None:
    options = SessionOptions(audit_rate=1.0, push=push, evidence_folder=tmp_path)
    async with toy_swarm(spans("c2", "c3"), sessions=options, identity=identity_of("client")) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c"].spoil = shifted
        toy["c"].lie = quiet
        await ask(toy)
        assert has_caught(toy, "c") == (not push)
        assert os.listdir(tmp_path) == [], "there is nothing that it has signed"


def replaced(change: Callable[[Voucher], Voucher | bytes]) -> Callable[[AnyMessage], AnyMessage]:
    """Vouches for something else than it gives."""

    def lie(message: AnyMessage) -> AnyMessage:
        if not (isinstance(message, Result) and message.vouchers):
            return message
        changed = [change(Voucher.unpack(one)) for one in message.vouchers]
        packed = tuple(
            one if isinstance(one, bytes) else one.signed(identity_of("a")).pack() for one in changed
        )
        return msgspec.structs.replace(message, vouchers=packed)

    return lie


@pytest.mark.parametrize(
    "change",
    [
        lambda voucher: b"nonsense",
        lambda voucher: msgspec.structs.replace(voucher, outputs=bytes(32)),
        lambda voucher: msgspec.structs.replace(voucher, imprint=bytes(256)),
        lambda voucher: msgspec.structs.replace(voucher, imprint=b"\xff" * 256),
        lambda voucher: msgspec.structs.replace(voucher, dtype="float16"),
        lambda voucher: msgspec.structs.replace(voucher, session_id="0" * 32),
        lambda voucher: msgspec.structs.replace(voucher, model_id="other"),
        lambda voucher: msgspec.structs.replace(voucher, start=1),
        lambda voucher: msgspec.structs.replace(voucher, signature=bytes(64)).pack(),
        lambda voucher: msgspec.structs.replace(voucher, peer=identity_of("b").peer),
    ],
)
@in_virtual_time
async def test_who_vouches_for_something_else_loses_the_session_at_once(change: Any) -> None:
    async with toy_swarm(spans("a2"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["a"].lie = replaced(change)
        answer = await toy.swarm.generate(PROMPT, raw=True, max_new_tokens=4)
        assert list(answer.token_ids) == toy.ends.expected(list(PROMPT.encode()), 4)
        assert answer.recoveries == 1
        assert toy[name_of(toy, answer.route[0].peer)] is toy["a2"]
        await toy.swarm.settle_audits()
        assert toy.swarm.audits.caught == 0


@in_virtual_time
async def test_who_vouches_for_other_inputs_than_the_client_brought_is_to_blame() -> None:
    async with toy_swarm(spans("a2"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["a"].lie = replaced(lambda voucher: msgspec.structs.replace(voucher, inputs=bytes(32)))
        await ask(toy)
        assert toy.swarm.audits.unclear == 1
        assert toy.swarm.route().hops[0].peer == toy["a2"].peer


@in_virtual_time
async def test_a_hop_cannot_get_out_of_an_audit_by_claiming_pages_that_nobody_named() -> None:
    async with toy_swarm(spans("b2"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["b"].claims = 32
        assert await ask(toy) == toy.ends.expected(list(PROMPT.encode()), 8)
        assert toy["b"].opened
        assert toy["b2"].opened


@in_virtual_time
async def test_sessions_that_are_audited_look_like_any_other() -> None:
    """They name pages, under a secret of their own, so that what hops have kept is computed anew."""
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        for _ in range(2):
            await ask(toy, prompt="x" * 100)
        first, second = (one for one in toy["b"].opened if one.priority == "interactive")
        assert len(first.page_keys) == len(second.page_keys) > 0
        assert first.page_keys != second.page_keys
        assert all(one.vouch for one in (first, second))
        assert toy["a"].opened[0].page_keys


@in_virtual_time
async def test_what_the_first_hop_has_kept_is_audited_with_the_rest() -> None:
    async with toy_swarm(dict.fromkeys("abc", Span(0, 6)), sessions=ALL) as toy:
        await prefer(toy, "a")
        await ask(toy, prompt="x" * 100)
        assert toy.swarm.audits == Counts(agreed=1)
        await ask(toy, prompt="x" * 100)
        assert (96, 4) in toy["a"].steps, "it began with the pages it had"
        assert toy.swarm.audits == Counts(agreed=2)


@in_virtual_time
async def test_a_long_session_is_audited_while_it_goes_on() -> None:
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        stream = toy.swarm.stream("abc", raw=True, max_new_tokens=600)
        async for _ in stream:
            if toy.swarm.audits.agreed:
                break
        await stream.aclose()
        assert toy.swarm.audits.agreed


@in_virtual_time
async def test_a_lost_and_replaced_hop_is_audited_for_what_it_did_itself() -> None:
    async with toy_swarm(spans("b2", "b3"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")

        async def die(steps: int) -> None:
            if steps == 4:
                toy["b"].kill()

        toy["b"].before_step = die
        assert await ask(toy) == toy.ends.expected(list(PROMPT.encode()), 8)
        assert toy.swarm.audits == Counts(agreed=1, unchecked=2)


@in_virtual_time
async def test_speculation_that_is_rolled_back_looks_like_no_lie() -> None:
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        for name in ENDS:
            toy.network.set_link("client", toy[name].peer, latency=0.05)
        text = "abcabcabcabcabcabcabcabcabcabc" * 3
        assert await ask(toy, prompt=text, tokens=60) == toy.ends.expected(list(text.encode()), 60)
        assert toy.swarm.audits == Counts(agreed=3)


@pytest.mark.parametrize(("private", "rate", "audited"), [(True, None, 0), (False, 1.0, 3), (True, 1.0, 3)])
@in_virtual_time
async def test_private_swarms_are_audited_where_that_is_asked_for(
    private: bool, rate: float | None, audited: int
) -> None:
    options = SessionOptions(audit_rate=rate)
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=options, is_private=private) as toy:
        await ask(toy)
        assert toy.swarm.audits.agreed == audited


def test_public_swarms_are_audited_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0.01 <= SessionOptions().audited(is_private=False) <= 0.05
    assert SessionOptions().audited(is_private=True) == 0
    with pytest.raises(InputError, match="audit_rate is 2"):
        SessionOptions(audit_rate=2)


@in_virtual_time
async def test_what_rounding_may_explain_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.client.auditor.sensitivity", lambda *_: Sensitivity(growth=1e6, row=1e6))
    async with toy_swarm(spans("c2", "c3"), sessions=ALL) as toy:
        await prefer(toy, "a", "b", "c")
        toy["c"].spoil = shifted
        await ask(toy)
        assert toy.swarm.audits == Counts(agreed=1, unchecked=2)
        assert not has_caught(toy, "c")


@in_virtual_time
async def test_more_than_may_wait_is_not_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop was brought tokens, which take nothing; the others hidden states."""
    monkeypatch.setattr("swarm.client.auditor.MAX_WAITING_BYTES", 100)
    async with toy_swarm(spans("a2", "b2", "c2"), sessions=ALL) as toy:
        await ask(toy)
        assert toy.swarm.audits == Counts(agreed=1)
