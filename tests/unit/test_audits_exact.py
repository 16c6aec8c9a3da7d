"""Audits of real engines: liars of each kind against honest peers, and evidence that anybody can check."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.liars import KINDS, liar
from swarm.blocks.engine import Engine, EngineConfig
from swarm.blocks.models import Model, resolve
from swarm.client.__main__ import main
from swarm.client.evidence import Evidence, load, token_rows
from swarm.client.experience import LIED
from swarm.client.faults import NoCapacity
from swarm.client.leg import Asked
from swarm.client.options import SessionOptions
from swarm.client.recomputing import Finding, examine
from swarm.client.route import Hop, Route
from swarm.client.session import Session
from swarm.errors import InputError
from swarm.net.identity import Identity
from swarm.net.messages import Step
from swarm.net.virtual_time import in_virtual_time
from swarm.net.vouchers import Chain, Voucher
from swarm.server.admission import Terms
from swarm.server.vouching import Form, Vouching
from swarm.spans import Span
from tests.tiny import tiny_checkpoint
from tests.unit.test_recovery import PROMPT, Several, answer, several

HONEST = {
    "a": Span(0, 2),
    "b": Span(0, 2),
    "c": Span(2, 4),
    "d": Span(2, 4),
    "e": Span(4, 6),
    "f": Span(4, 6),
    "g": Span(0, 3),
    "h": Span(1, 5),
    "i": Span(3, 6),
    "j": Span(0, 6),
}
"""Ten peers, of which at least three hold each block."""


@pytest.fixture(scope="module")
def model(checkpoint_of: Callable[[str], tuple[Path, Any]]) -> Model:
    return resolve(str(checkpoint_of("Llama")[0]))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("other")
    tiny_checkpoint(folder, "Llama", seed=1)
    return resolve(str(folder))


async def ask(swarm: Several, *names: str) -> list[int]:
    """An answer along hops at these peers, each for two blocks, once it is audited."""
    client = swarm.client
    said = {one.peer: one for one in client.directory.announcements}
    peers = [swarm.places[name].identity.peer for name in names]
    hops = tuple(Hop(peer, Span(2 * at, 2 * at + 2), said[peer]) for at, peer in enumerate(peers))
    model = client.model
    asked = Asked(model.model_id, model.hidden_size, model.vocab_size, 400, PROMPT)
    session = await Session.open(client._environment, Route(hops, 0.1), asked)
    client._sessions.add(session)
    given = await answer(swarm, session=session)
    await client.settle_audits()
    return given


def caught(swarm: Several) -> set[str]:
    """Who is left out of all routes."""
    avoided = swarm.client._routes._experience.avoided([], asyncio.get_running_loop().time())
    liars = [peer for peer, one in avoided.items() if one.reason == LIED]
    return {name for name, place in swarm.places.items() if place.identity.peer in liars}


def ask_no_opinion(swarm: Several, names: Iterable[str]) -> None:
    """Nobody of these is to be a witness."""
    peers = [swarm.places[name].identity.peer for name in names]
    for said in swarm.client.directory.announcements:
        if said.peer_id in peers:
            full = NoCapacity(Hop(said.peer_id, said.span, said), "has no room", 1e6)
            swarm.client._routes.judge(full)


SESSION = "1" * 32
WHERE = dict(zip(KINDS, (Span(0, 2), Span(2, 4), Span(4, 6)) * 2, strict=True))
"""Which blocks each kind of liar holds."""


@pytest.fixture(scope="module")
def evidence(model: Model, other: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evidence]:
    """Has each kind of liar caught among ten honest peers; the evidence against each."""
    folder = tmp_path_factory.mktemp("evidence")
    options = SessionOptions(audit_rate=1.0, evidence_folder=folder)

    async def engine_of(name: str, span: Span, config: EngineConfig) -> Any:
        if name in KINDS:
            return await liar(name, model, other, span, config)
        return await Engine.load(model, span, config)

    @in_virtual_time
    async def run() -> dict[str, str]:
        identity = Identity.from_seed("client")
        async with several(
            model, HONEST | WHERE, engine_of=engine_of, sessions=options, identity=identity
        ) as swarm:
            ask_no_opinion(swarm, KINDS)
            for count, (kind, span) in enumerate(WHERE.items(), start=1):
                way = ["a", "c", "e"]
                way[span.start // 2] = kind
                await ask(swarm, *way)
                assert caught(swarm) == set(KINDS[:count]), kind
            assert swarm.client.audits.caught == len(KINDS)
            assert await ask(swarm, "a", "c", "e") == await ask(swarm, "b", "d", "f")
            assert caught(swarm) == set(KINDS)
            return {place.identity.peer: name for name, place in swarm.places.items()}

    names = run()
    found = {}
    for file in folder.iterdir():
        one = load(file)
        found[names[one.checked().peer]] = one
    return found


def test_each_kind_of_liar_is_caught_among_ten_honest_peers_and_nobody_else(
    evidence: dict[str, Evidence],
) -> None:
    assert set(evidence) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_the_weights_finds_the_evidence_right(
    kind: str, evidence: dict[str, Evidence], model: Model, tmp_path: Path
) -> None:
    finding = check(evidence[kind], model, tmp_path)
    assert finding.holds
    assert finding.span == WHERE[kind]
    assert finding.apart > 10 * finding.allowed


def check(evidence: Evidence, model: Model, folder: Path) -> Finding:
    file = folder / "some.evidence"
    file.write_bytes(evidence.pack())
    return asyncio.run(examine(file, str(model.path), lambda stage, fraction: None))


AUDITOR = Identity.from_seed("client")


def resigned(evidence: Evidence, **changes: Any) -> Evidence:
    """What an auditor can make of it, and sign."""
    return msgspec.structs.replace(evidence, **changes).signed(AUDITOR)


def forged(voucher: Voucher, **changes: Any) -> bytes:
    return msgspec.structs.replace(voucher, **changes).pack()


def test_evidence_that_was_tampered_with_is_void(evidence: dict[str, Evidence], other: Model) -> None:
    one = evidence["zeros"]
    voucher = one.checked()
    rows = bytearray(one.rows)
    rows[5] ^= 1
    wrong = [
        msgspec.structs.replace(one, at=one.at + 1),
        msgspec.structs.replace(one, auditor=Identity.from_seed("x").peer),
        resigned(one, rows=bytes(rows)),
        resigned(one, rows=one.rows[:-4]),
        resigned(one, rows=b""),
        resigned(one, tokens=(1, 2, 3)),
        resigned(one, width=one.width // 2),
        resigned(one, width=2**20),
        resigned(one, voucher=b"nonsense"),
        resigned(one, voucher=forged(voucher, imprint=bytes(256))),
        resigned(one, voucher=forged(voucher, dtype="bfloat16")),
        resigned(one, voucher=msgspec.structs.replace(voucher, imprint=bytes(256)).signed(AUDITOR).pack()),
        resigned(one, voucher=evidence["noise"].voucher),
    ]
    for tampered in wrong:
        with pytest.raises(InputError, match="The evidence is void"):
            tampered.checked()
    with pytest.raises(InputError, match="no evidence"):
        Evidence.unpack(one.pack()[:-1])


@pytest.mark.parametrize("brings_ids", [False, True])
def test_an_honest_peer_cannot_be_accused_by_what_it_signed(
    brings_ids: bool, model: Model, tmp_path: Path
) -> None:
    """Whatever the auditor brought it: the sensible, and what makes the least rounding grow."""
    span = Span(0, 2) if brings_ids else Span(2, 4)
    for seed, size in ((0, 1.0), (1, 1e-6), (2, 1e6)):
        honest = asyncio.run(vouched(model, span, seed, size, brings_ids=brings_ids))
        finding = check(honest, model, tmp_path)
        assert not finding.holds
        assert finding.apart <= finding.allowed
        assert "does not hold" in str(finding)


async def vouched(model: Model, span: Span, seed: int, size: float, *, brings_ids: bool) -> Evidence:
    """What an honest engine gives for some inputs and signs, as an accusation of it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 90, 40).astype(np.uint32)
    hidden = (size * rng.standard_normal((40, model.hidden_size))).astype(np.float32)
    config = EngineConfig(dtype="float32", device="cpu", kv_tokens=64)
    engine = await Engine.load(model, span, config)
    engine.open_session(SESSION, span, 64)
    came = tokens if brings_ids else hidden
    dtype = "uint32" if brings_ids else "float32"
    data = memoryview(came.tobytes())
    done = await engine.step(SESSION, 0, data, came.shape, dtype, "raw")
    terms = Terms(SESSION, span, 64, model.hidden_size, "float32", "raw", 64, brings_ids)
    vouching = Vouching(Identity.from_seed("a"), Form(model.model_id, "float32", "none"), terms, b"")
    step = Step(
        session_id=SESSION,
        number=1,
        seq_pos=0,
        payload_type="token_ids" if brings_ids else "hidden_states",
        response_type="hidden_states",
        shape=came.shape,
        dtype=dtype,
    )
    [voucher] = vouching.on_step(step, data, done)
    engine.close()
    return Evidence(
        voucher=voucher,
        width=model.hidden_size,
        tokens=tuple(tokens.tolist()) if brings_ids else (),
        rows=b"" if brings_ids else hidden.tobytes(),
        ids=(),
        auditor=AUDITOR.peer,
        at=1.0,
    ).signed(AUDITOR)


def test_a_finding_says_how_much_is_allowed_and_why() -> None:
    found = Finding("peer", "auditor", Span(0, 2), "float32 none", apart=0.2, allowed=0.3, growth=300.0)
    assert not found.holds
    assert "does not hold" in str(found)
    assert "grow 3e+02 times" in str(found)
    assert replace(found, allowed=0.1).holds


async def test_tokens_that_the_model_does_not_have_are_no_evidence(model: Model, tmp_path: Path) -> None:
    honest = await vouched(model, Span(0, 2), 0, 1.0, brings_ids=True)
    tokens = [500] * len(honest.tokens)
    chain = Chain()
    chain.extend(token_rows(tokens))
    voucher = msgspec.structs.replace(Voucher.unpack(honest.voucher), inputs=chain.at(chain.end))
    signed = voucher.signed(Identity.from_seed("a")).pack()
    file = tmp_path / "some.evidence"
    file.write_bytes(resigned(honest, voucher=signed, tokens=tuple(tokens)).pack())
    with pytest.raises(InputError, match="names tokens that"):
        await examine(file, str(model.path), lambda stage, fraction: None)


def test_the_command_says_whether_evidence_holds(
    evidence: dict[str, Evidence],
    model: Model,
    other: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "noise.evidence"
    file.write_bytes(evidence["noise"].pack())
    assert main(["audit", str(file), "--model", str(model.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"]
    assert said["accused"] == Identity.from_seed("noise").peer
    assert said["blocks"] == list(WHERE["noise"])
    assert main(["audit", str(file), "--model", str(model.path)]) == 0
    assert "The evidence holds" in capsys.readouterr().out

    file.write_bytes(asyncio.run(vouched(model, Span(2, 4), 0, 1.0, brings_ids=False)).pack())
    assert main(["audit", str(file), "--model", str(model.path)]) == 1
    assert "The evidence does not hold" in capsys.readouterr().out

    for arguments, complaint in (
        ([str(file), "--model", str(other.path)], "about another model"),
        ([str(tmp_path / "none"), "--model", str(model.path)], "cannot be read"),
    ):
        assert main(["audit", *arguments]) == 2
        assert complaint in capsys.readouterr().err
    file.write_bytes(b"nonsense")
    assert main(["audit", str(file)]) == 2
    assert "This is no evidence" in capsys.readouterr().err
