"""Announcements out of records: only about oneself, only where they belong, and safe to print."""

import math

import pytest

from swarm.dht.announcement import (
    MODELS_KEY,
    Announcement,
    ModelEntry,
    Throughput,
    announcement_from,
    block_key,
    clean,
    encode,
    model_entry_from,
)
from swarm.dht.records import RecordError, SignedRecord, sign
from swarm.net.identity import Identity
from swarm.spans import Span

ALICE = Identity.from_seed("alice")
EVIL = "\x1b[31m\x07red\u202e\u2028\nend"


def announcement(**changes: object) -> Announcement:
    fields: dict[str, object] = {
        "peer": ALICE.peer,
        "model_id": "m.1",
        "start": 2,
        "end": 5,
        "state": "serving",
    }
    return Announcement(**(fields | changes))  # type: ignore[arg-type]


def record_of(body: bytes, key: str = "m.1.3") -> SignedRecord:
    return sign(ALICE, key, body, 100.0)


def fault_of(record: SignedRecord) -> str:
    with pytest.raises(RecordError) as caught:
        announcement_from(record)
    return caught.value.fault


@pytest.mark.parametrize("block", [2, 3, 4])
def test_it_is_read_from_each_block_of_its_span(block: int) -> None:
    said = announcement(
        rtts={"x": 0.1}, throughput=Throughput(decode=3.0), addresses=("/ip4/127.0.0.1/tcp/1",)
    )
    assert announcement_from(record_of(encode(said), block_key("m.1", block))) == said
    assert said.span == Span(2, 5)


@pytest.mark.parametrize(
    "key", ["m.1.1", "m.1.5", "m.1.03", "m.1.3.", "m.1", "m.2.3", "3", "m.1. 3", MODELS_KEY]
)
def test_under_another_key_it_is_misplaced(key: str) -> None:
    assert fault_of(record_of(encode(announcement()), key)) == "misplaced"


def test_nobody_announces_another() -> None:
    other = Identity.from_seed("other").peer
    assert fault_of(record_of(encode(announcement(peer=other)))) == "not_its_own"


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 3, "end": 3},
        {"start": -1},
        {"end": 10**9},
        {"state": "asleep"},
        {"progress": 1.5},
        {"progress": math.nan},
        {"throughput": Throughput(decode=math.inf)},
        {"rtts": {"x": -1.0}},
        {"rtts": {"x": math.nan}},
        {"rtts": {str(number): 0.1 for number in range(65)}},
        {"name": "n" * 101},
        {"kv_tokens_left": -1},
        {"addresses": ("/ip4",) * 17},
        {"model_id": "m\x1b.1"},
    ],
)
def test_values_out_of_bounds_are_refused(changes: dict[str, object]) -> None:
    fields = {"peer": ALICE.peer, "model_id": "m.1", "start": 2, "end": 5, "state": "serving"} | changes
    body = encode(fields)  # type: ignore[arg-type]
    assert fault_of(record_of(body)) == "bad_body"


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x91" * 3000, encode([1, 2])])  # type: ignore[arg-type]
def test_malformed_bodies_are_refused(body: bytes) -> None:
    assert fault_of(record_of(body)) == "bad_body"


def test_texts_cannot_steer_a_terminal() -> None:
    said = announcement(
        name=EVIL, version=EVIL, dtype=EVIL, quantization=EVIL, adapters=(EVIL,), addresses=(EVIL,)
    )
    heard = announcement_from(record_of(encode(said)))
    texts = (heard.name, heard.version, heard.dtype, heard.quantization, *heard.adapters)
    assert set(texts) == {"[31mredend"}
    assert heard.addresses == ()


def test_clean_keeps_what_people_write() -> None:
    assert clean("Ünïcode 名前 🐝, two  spaces") == "Ünïcode 名前 🐝, two  spaces"


def test_model_entries() -> None:
    entry = ModelEntry(model_id="m.1", name="tiny" + EVIL, num_blocks=6, fingerprint="abc")
    heard = model_entry_from(record_of(encode(entry), MODELS_KEY))
    assert (heard.model_id, heard.name, heard.num_blocks) == ("m.1", "tiny[31mredend", 6)
    for record in (record_of(encode(entry)), record_of(b"\x80", MODELS_KEY)):
        with pytest.raises(RecordError):
            model_entry_from(record)
