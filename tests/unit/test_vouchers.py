"""Vouchers: how they are packed and signed, digests of rows, imprints, and what a hop vouches for."""

import struct
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kernels import imprint as imprints
from swarm.kernels.imprint import difference, differences, imprint, is_imprint, projected
from swarm.net import vouchers
from swarm.net.identity import Identity
from swarm.net.messages import Step
from swarm.net.vouchers import Chain, Voucher, VoucherError, digest_of, row_hash, rows_of, tensor_of
from swarm.page_keys import page_keys
from swarm.server.admission import Terms
from swarm.server.vouching import Form, Vouching
from swarm.spans import Span

SERVER = Identity.from_seed("server")
SESSION = "1" * 32
WIDTH = 8
FORM = Form("m", "float32", "none")


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def voucher(**changes: Any) -> Voucher:
    fields: dict[str, Any] = {
        "peer": SERVER.peer,
        "model_id": "m",
        "start": 2,
        "end": 4,
        "dtype": "float32",
        "quantization": "none",
        "session_id": SESSION,
        "wire_dtype": "float32",
        "codec": "raw",
        "brings_ids": False,
        "kind": "hidden_states",
        "held": 0,
        "first": 0,
        "until": 32,
        "inputs": b"i" * 32,
        "outputs": b"o" * 32,
        "imprint": bytes(256),
        "at": 1.0,
    }
    return Voucher(**{**fields, **changes})


def test_only_the_peer_itself_can_have_signed_it() -> None:
    signed = voucher().signed(SERVER)
    assert Voucher.unpack(signed.pack()) == signed
    assert signed.is_signed()
    assert not voucher().is_signed()
    for field in signed.__struct_fields__:
        value = getattr(signed, field)
        if isinstance(value, bool):
            changed: Any = not value
        elif isinstance(value, int | float):
            changed = value + 1
        else:
            changed = value[:-1] + (b"!" if isinstance(value, bytes) else "!")
        assert not msgspec.structs.replace(signed, **{field: changed}).is_signed(), field
    assert (
        not msgspec.structs.replace(voucher(), peer=Identity.from_seed("x").peer).signed(SERVER).is_signed()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 4},
        {"until": 0},
        {"held": 3},
        {"first": 3, "held": 2},
        {"at": float("nan")},
        {"imprint": b""},
        {"kind": "token_ids"},
        {"inputs": b"short"},
        {"dtype": "x" * 200},
        {"signature": b"x" * 65},
    ],
)
def test_what_cannot_be_is_no_voucher(wrong: dict[str, Any]) -> None:
    with pytest.raises(VoucherError):
        Voucher.unpack(voucher(**wrong).pack())


@given(st.binary(max_size=2000))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(VoucherError):
        Voucher.unpack(data)


def test_constants_of_two_rooms_agree() -> None:
    assert imprints.IMPRINT_BYTES == vouchers.IMPRINT_BYTES
    assert len(voucher().signed(SERVER).pack()) < vouchers.MAX_VOUCHER_BYTES


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=20), st.data())
def test_a_chain_tells_of_all_rows_before_a_position_and_can_be_cut(
    some: list[bytes], data: st.DataObject
) -> None:
    chain = Chain()
    chain.extend(some)
    assert chain.end == len(some)
    cut = data.draw(st.integers(0, len(some)))
    other = Chain()
    other.extend(some[:cut])
    assert chain.at(cut) == other.at(cut) == digest_of(some[:cut])
    chain.cut(cut)
    chain.extend([b"another"])
    assert chain.at(chain.end) == digest_of([*some[:cut], b"another"])
    digests = {chain.at(at) for at in range(chain.end + 1)}
    assert len(digests) == chain.end + 1


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "raw"), ("float16", "scaled"), ("int8", "blocks")])
def test_rows_are_the_same_however_a_sequence_is_cut(dtype: Any, codec: Any) -> None:
    from torch import from_numpy

    from swarm.kernels.codecs import to_wire

    values = from_numpy(np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32))
    whole = list(rows_of(to_wire(values, dtype, codec), (7, 40), dtype, codec))
    parts = [
        row
        for first, end in ((0, 3), (3, 4), (4, 7))
        for row in rows_of(to_wire(values[first:end], dtype, codec), (end - first, 40), dtype, codec)
    ]
    assert whole == parts
    assert len(set(whole)) == 7
    assert tensor_of(whole, 40, dtype, codec) == bytes(to_wire(values, dtype, codec))


@given(st.integers(1, 70), st.integers(1, 300), st.floats(1e-6, 0.3), st.integers(0, 2**31))
def test_an_imprint_tells_how_far_rows_are_apart(count: int, width: int, size: float, first: int) -> None:
    rng = np.random.default_rng(count * width)
    one = rng.standard_normal((count, width)).astype(np.float32) * 10
    noise = rng.standard_normal((count, width)).astype(np.float32)
    other = one + np.float32(size) * noise * np.abs(one).mean(1, keepdims=True)
    kept, changed = projected(one), projected(other)
    assert difference(imprint(kept, first), kept, first) == (0.0, 0.0)
    apart = difference(imprint(kept, first), changed, first)
    if count * width > 500:
        assert size / 8 < apart.shape < size * 3
    assert len(differences(kept, changed)) == count


def test_an_imprint_depends_on_place_and_order_and_scale() -> None:
    kept = projected(rows(32))
    left = imprint(kept, 0)
    assert is_imprint(left)
    assert max(difference(left, kept, 1)) > 0.1
    assert max(difference(left, kept[::-1], 0)) > 0.1
    assert difference(left, projected(rows(32) * 2), 0).scale > 0.5
    assert not is_imprint(left[:-1])
    assert not is_imprint(struct.pack("<64f", *[float("nan")] * 64))


def test_outliers_hide_nothing() -> None:
    """Some models have channels that are thousands of times larger than the others."""
    plain = rows(32)
    plain[:, 3] = 5000
    spoiled = plain.copy()
    spoiled[:, :3] *= -1
    assert difference(imprint(projected(plain), 0), projected(spoiled), 0).shape > 0.05 / 32


class Session:
    """A hop's session, and what it vouches for."""

    def __init__(self, held: int = 0, keys: bytes = b"", *, takes_ids: bool = False) -> None:
        self.terms = Terms(SESSION, Span(2, 4), 1000, WIDTH, "float32", "raw", 512, takes_ids, length=held)
        self.vouching = Vouching(SERVER, FORM, self.terms, keys)
        self.number = 0

    def step(self, at: int, came: np.ndarray, gave: np.ndarray, **changes: Any) -> list[Voucher]:
        self.number += 1
        brings_ids = came.dtype == np.uint32
        fields: dict[str, Any] = {
            "session_id": SESSION,
            "number": self.number,
            "seq_pos": at,
            "payload_type": "token_ids" if brings_ids else "hidden_states",
            "response_type": "token_ids" if gave.dtype == np.uint32 else "hidden_states",
            "shape": came.shape,
            "dtype": "uint32" if brings_ids else "float32",
            **changes,
        }
        done: Any = SimpleNamespace(
            data=memoryview(gave.tobytes()),
            shape=gave.shape,
            dtype="uint32" if gave.dtype == np.uint32 else "float32",
            codec="raw",
        )
        return self.unpacked(self.vouching.on_step(Step(**fields), memoryview(came.tobytes()), done))

    def last(self) -> list[Voucher]:
        packed = self.vouching.last()
        return self.unpacked(() if packed is None else (packed,))

    def unpacked(self, some: Any) -> list[Voucher]:
        found = [Voucher.unpack(one) for one in some]
        assert all(one.is_signed() for one in found)
        return found


def inputs_of(*parts: np.ndarray) -> bytes:
    return digest_of([row.tobytes() for part in parts for row in part])


def outputs_of(*parts: np.ndarray) -> bytes:
    return digest_of([row_hash(row.tobytes()) for part in parts for row in part])


def spanning(some: list[Voucher]) -> list[tuple[int, int]]:
    return [(one.first, one.until) for one in some]


def test_a_voucher_comes_with_each_few_dozen_rows_and_one_at_the_end() -> None:
    session, came, gave = Session(), rows(70, 1), rows(70, 2)
    found = session.step(0, came[:20], gave[:20])
    assert found == []
    for at in range(20, 70):
        found += session.step(at, came[at : at + 1], gave[at : at + 1])
    assert spanning(found) == [(0, 32), (32, 64)]
    found += session.last()
    assert spanning(found) == [(0, 32), (32, 64), (64, 70)]
    for one in found:
        assert one.inputs == inputs_of(came[: one.until])
        assert one.outputs == outputs_of(gave[one.first : one.until])
        assert max(difference(one.imprint, projected(gave[one.first : one.until]), one.first)) < 1e-6
    assert session.last() == []


def test_what_is_rolled_back_is_vouched_for_no_more() -> None:
    session, came, gave = Session(), rows(60, 1), rows(60, 2)
    assert session.step(0, came[:20], gave[:20]) == []
    other = rows(30, 3)
    assert session.step(10, other[:10], gave[10:20]) == []
    found = session.step(20, other[10:], gave[20:40])
    assert spanning(found) == [(0, 40)]
    assert found[0].inputs == inputs_of(came[:10], other)
    found = session.step(5, came[5:6], gave[5:6])
    session.vouching.cut(6)
    assert spanning(session.last()) == [(5, 6)]


def test_rows_that_are_not_asked_for_are_not_vouched_for() -> None:
    """The last hop gives few rows of a prompt: what lies between is in no voucher."""
    session, came, gave = Session(), rows(40, 1), rows(40, 2)
    assert session.step(0, came[:30], gave[29:30]) == []
    found = session.step(30, came[30:], gave[39:])
    assert spanning(found) == [(29, 30)]
    assert spanning(session.last()) == [(39, 40)]


def test_told_tokens_are_vouched_for_without_an_imprint() -> None:
    session, ids = Session(), np.arange(40, dtype=np.uint32)
    [found] = session.step(0, rows(40), ids)
    assert (found.kind, found.imprint) == ("token_ids", b"")
    assert found.outputs == digest_of([row_hash(struct.pack("<I", one)) for one in ids])
    session.step(40, rows(1, 4), ids[:1])
    [found] = session.step(41, rows(1, 5), rows(1, 6))
    assert spanning([found]) == [(40, 41)]


def test_pages_that_were_held_are_named_by_their_key() -> None:
    tokens = np.arange(100, 200, dtype=np.uint32)
    keys = page_keys(tokens[:96].tolist())
    session = Session(64, keys, takes_ids=True)
    [found] = session.step(64, tokens[64:], rows(36))
    assert (found.held, found.brings_ids) == (64, True)
    chain = Chain(64, page_keys(tokens[:64].tolist())[-16:])
    chain.extend([struct.pack("<I", one) for one in tokens[64:]])
    assert found.inputs == chain.at(100)


@pytest.mark.parametrize("position", [10, 70])
def test_nothing_is_vouched_for_of_what_was_not_brought(position: int) -> None:
    session = Session(64, bytes(96), takes_ids=True)
    tokens = np.arange(40, dtype=np.uint32)
    assert session.step(position, tokens, rows(40)) == []
    assert session.step(position + 40, tokens, rows(40)) == []
    assert session.last() == []


def test_a_session_that_begins_anew_is_vouched_for() -> None:
    session = Session(64, bytes(96))
    [found] = session.step(0, rows(40), rows(40))
    assert (found.held, found.first) == (0, 0)
    assert session.step(40, np.arange(40, dtype=np.uint32), rows(40)) == [], "ids after hidden states"


def test_what_was_handed_over_is_not_vouched_for() -> None:
    session = Session()
    session.vouching.stop()
    assert session.step(0, rows(40), rows(40)) == []
