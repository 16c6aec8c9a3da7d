"""Signed records: nobody can write in another's name, and nothing malformed gets further than its error."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.dht import records
from swarm.dht.records import (
    CLOCK_SKEW,
    MAX_BODY_BYTES,
    MAX_KEY_CHARS,
    MAX_LIFETIME,
    MAX_RECORD_BYTES,
    RecordError,
    SignatureMemory,
    SignedRecord,
    sign,
)
from swarm.net.identity import Identity

NOW = 1_800_000_000.0
ALICE = Identity.from_seed("alice")
MALLORY = Identity.from_seed("mallory")
RECORD = sign(ALICE, "model.3", b"body", NOW + 30)


def fault_of(record: SignedRecord, now: float = NOW) -> str:
    with pytest.raises(RecordError) as caught:
        record.verify(now)
    return caught.value.fault


def test_a_record_survives_packing_and_verifies() -> None:
    again = SignedRecord.unpack(RECORD.pack())
    assert again == RECORD
    assert (again.key, again.peer, again.body) == ("model.3", ALICE.peer, b"body")
    again.verify(NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "model.4"},
        {"peer": MALLORY.peer},
        {"peer": "nobody"},
        {"expires_at": NOW + 31},
        {"body": b"other"},
        {"signature": bytes(64)},
    ],
)
def test_any_change_breaks_the_signature(changes: dict[str, object]) -> None:
    assert fault_of(msgspec.structs.replace(RECORD, **changes)) == "bad_signature"


def test_a_record_signed_by_another_is_refused() -> None:
    forged = sign(MALLORY, "model.3", b"body", NOW + 30)
    assert fault_of(msgspec.structs.replace(forged, peer=ALICE.peer)) == "bad_signature"


def test_a_signature_made_for_something_else_is_no_record() -> None:
    bare = msgspec.msgpack.encode((RECORD.key, RECORD.peer, RECORD.expires_at, RECORD.body))
    assert fault_of(msgspec.structs.replace(RECORD, signature=ALICE.sign(bare))) == "bad_signature"


def test_a_record_holds_until_it_expires_and_not_longer() -> None:
    RECORD.verify(NOW + 29.9)
    assert fault_of(RECORD, NOW + 30) == "expired"


def test_a_record_may_not_ask_to_be_kept_forever() -> None:
    longest = NOW + MAX_LIFETIME + CLOCK_SKEW
    sign(ALICE, "k", b"", longest).verify(NOW)
    assert fault_of(sign(ALICE, "k", b"", longest + 1)) == "lives_too_long"


@pytest.mark.parametrize("expires_at", [math.nan, math.inf, -math.inf])
def test_times_that_are_no_numbers_are_refused(expires_at: float) -> None:
    with pytest.raises(RecordError) as caught:
        sign(ALICE, "k", b"", expires_at)
    assert caught.value.fault == "malformed"


@pytest.mark.parametrize(
    ("key", "body", "fault"),
    [
        ("k" * (MAX_KEY_CHARS + 1), b"", "malformed"),
        ("", b"", "malformed"),
        ("k", bytes(MAX_BODY_BYTES + 1), "too_large"),
    ],
)
def test_sizes_are_bounded_when_signing(key: str, body: bytes, fault: str) -> None:
    with pytest.raises(RecordError) as caught:
        sign(ALICE, key, body, NOW)
    assert caught.value.fault == fault


def test_the_largest_record_fits() -> None:
    sign(ALICE, "\N{GRINNING FACE}" * MAX_KEY_CHARS, bytes(MAX_BODY_BYTES), NOW + 1).verify(NOW)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        RECORD.pack()[:-1],
        RECORD.pack() + b"\x00",
        b"\x91" * 5000,
        msgspec.msgpack.encode([2, "k", "p", 1.0, b"", bytes(64)]),
        msgspec.msgpack.encode([1, "k", "p", 1.0, b"", bytes(63)]),
        msgspec.msgpack.encode([1, "k", "p", 1.0, b"", bytes(64), "more"]),
        msgspec.msgpack.encode([1, "k", "p", "soon", b"", bytes(64)]),
        msgspec.msgpack.encode([1, "k", "p", math.nan, b"", bytes(64)]),
        b"\x96\x01\xa1\xff\xa1p\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\xc4\x00\xc4\x40" + bytes(64),
    ],
)
def test_malformed_bytes_are_refused(packed: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        SignedRecord.unpack(packed)
    assert caught.value.fault == "malformed"


def test_too_many_bytes_are_not_even_read() -> None:
    with pytest.raises(RecordError) as caught:
        SignedRecord.unpack(bytes(MAX_RECORD_BYTES + 1))
    assert caught.value.fault == "too_large"


@given(st.data())
def test_damaged_records_never_verify(data: st.DataObject) -> None:
    packed = bytearray(RECORD.pack())
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    try:
        record = SignedRecord.unpack(bytes(packed))
        record.verify(NOW)
    except RecordError:
        return
    assert record == RECORD, "only another spelling of the very same record may pass"


@given(st.binary(max_size=300))
def test_noise_is_never_worse_than_a_record_error(packed: bytes) -> None:
    with pytest.raises(RecordError):
        SignedRecord.unpack(packed)


def test_a_good_signature_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = records.check_signature

    def counting(record: SignedRecord) -> None:
        checked.append(record.key)
        check(record)

    monkeypatch.setattr(records, "check_signature", counting)
    memory = SignatureMemory(capacity=2)
    packed = {key: sign(ALICE, key, b"", NOW).pack() for key in "abc"}
    for key in "aab":
        memory.unpack(packed[key])
    assert checked == ["a", "b"]
    memory.unpack(packed["c"])
    memory.unpack(packed["a"])
    assert checked == ["a", "b", "c", "a"], "the memory is bounded: the oldest was forgotten"


def test_a_bad_signature_is_not_remembered_as_good() -> None:
    memory = SignatureMemory()
    forged = msgspec.structs.replace(RECORD, peer=MALLORY.peer).pack()
    for _ in range(2):
        with pytest.raises(RecordError):
            memory.unpack(forged)
