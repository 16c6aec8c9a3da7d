"""docs/protocol.md against the code: every message, field, type, bound and default, and the examples."""

import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, get_args

import base58
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.routing import DHTID
from msgspec import inspect

from swarm.blocks.fingerprint import VOLATILE_KEYS, fingerprint
from swarm.dht import announcer, keeping, neighbours, node_ids, records, search
from swarm.dht.announcement import MODELS_KEY, Announcement, ModelEntry, PeerState, Throughput
from swarm.dht.node_ids import node_id_of
from swarm.net import (
    forms,
    inbound,
    messages,
    sealed_connection,
    sealing,
    shortcut_port,
    shortcut_turns,
    shortcut_words,
    shortcuts,
    transport,
    vouchers,
)
from swarm.net.framing import LENGTHS
from swarm.net.identity import Identity
from swarm.net.sealed_connection import PieceSeal
from swarm.net.shortcut_port import greeting
from swarm.net.shortcut_words import Offer
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS, page_keys
from swarm.sampling import Sampling
from swarm.server import admission, hand_over, hosted, server
from tests.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "protocol.md")
TEXT = " ".join(PAGE.text.split())

WORDS: dict[str, Any] = {
    "dtype": forms.Dtype,
    "codec": forms.Codec,
    "wire": forms.Wire,
    "priority": messages.Priority,
    "payload": messages.PayloadType,
    "response": messages.ResponseType,
    "code": messages.ErrorCode,
}
"""How the page calls choices that have a name."""

MESSAGES: dict[str, type] = {struct.__struct_config__.tag: struct for struct in get_args(messages.AnyMessage)}
TABLES: dict[str, type] = {
    **{f"### {tag}": struct for tag, struct in MESSAGES.items()},
    "An `onward` is": messages.Onward,
    "A `sampling` is": Sampling,
    "A voucher is a msgpack list: the number 1, then": vouchers.Voucher,
    "### Announcements": Announcement,
    "Throughput is measured": Throughput,
    "### Models": ModelEntry,
}
"""By what stands before its table."""

Row = tuple[str, ...]


def rows_after(words: str) -> list[Row]:
    """The rows of the table after the line that begins so, without its head."""
    lines = PAGE.text.splitlines()
    at = next(at for at, line in enumerate(lines) if line == words or line.startswith(f"{words} "))
    start = next(at for at in range(at + 1, len(lines)) if lines[at].startswith("|"))
    return [tuple(map(str.strip, line.strip("|").split("|"))) for line in _table(lines[start:])][2:]


def _table(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def number(value: float) -> str:
    for base, least in ((2, 2**20), (10, 10**6)):
        power = round(len(f"{int(value):b}") - 1 if base == 2 else len(str(int(value))) - 1)
        if value >= least and value == base**power:
            return f"{base}^{power}"
    return f"{value:g}"


def bounds(low: Any, high: Any) -> str:
    if high is None:
        return "" if low is None else f", from {number(low)}"
    return f", to {number(high)}" if low is None else f", {number(low)} to {number(high)}"


def in_words(kind: inspect.Type) -> str:
    """A type of msgspec's, as the page writes it."""
    match kind:
        case inspect.IntType():
            return f"int{bounds(kind.ge, kind.le)}"
        case inspect.FloatType():
            return f"float{bounds(kind.ge, kind.le)}"
        case inspect.StrType(pattern=None):
            return f"text{bounds(kind.min_length, kind.max_length)}"
        case inspect.StrType(pattern=r"\A[0-9a-f]{32}\Z"):
            return "session id"
        case inspect.BytesType():
            return f"bytes{bounds(kind.min_length, kind.max_length)}"
        case inspect.BoolType():
            return "bool"
        case inspect.LiteralType():
            return next(
                (word for word, one in WORDS.items() if set(get_args(one)) == set(kind.values)),
                choices(kind.values),
            )
        case inspect.VarTupleType():
            return f"list of {kind.min_length or 0} to {kind.max_length}: {in_words(kind.item_type)}"
        case inspect.DictType():
            return f"map to {kind.max_length}: {in_words(kind.key_type)} to {in_words(kind.value_type)}"
        case inspect.UnionType(types=(one, inspect.NoneType())):
            return f"{in_words(one)}, or nil"
        case inspect.TupleType(item_types=(one, other)) if one == other:
            return f"pair of {in_words(one)}"
        case inspect.StructType():
            return kind.cls.__name__.lower()
    raise AssertionError(f"the page has no words for {kind}")


def choices(values: Any) -> str:
    return " ".join(f"`{value}`" for value in sorted(values))


def default(field: inspect.Field) -> str:
    if field.required:
        return ""
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case Throughput():
            return "all 0"
        case str() if value:
            return f"`{value}`"
        case int() | float():
            return str(value)
    assert len(value) == 0
    return "empty"


def fields(struct: type) -> list[Row]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return [(f"`{field.encode_name}`", in_words(field.type), default(field)) for field in info.fields]


@pytest.mark.parametrize(("words", "struct"), TABLES.items(), ids=str)
def test_fields_are_those_of_the_code(words: str, struct: type) -> None:
    assert [row[:3] for row in rows_after(words)] == fields(struct)


def test_every_message_is_there_and_no_other() -> None:
    headings = re.findall(r"^### ([a-z_]+)$", PAGE.text, re.MULTILINE)
    assert sorted(headings) == sorted(MESSAGES)


def test_records_are_those_of_the_code() -> None:
    assert [row[:2] for row in rows_after("A record is a msgpack list: the number 1, then")] == [
        row[:2] for row in fields(records.SignedRecord)
    ]


def test_the_words_have_their_values() -> None:
    _, *told = rows_after("field or a value of another type")
    assert told == [(word, choices(get_args(one))) for word, one in WORDS.items()]


def test_every_error_is_explained() -> None:
    told = [row[0].strip("`") for row in rows_after("| `number` | int, 1 to 2^62, or nil |")]
    assert set(told) >= set(get_args(messages.ErrorCode))


def test_states_are_those_of_the_code() -> None:
    assert choices(get_args(PeerState)) in PAGE.text


@pytest.mark.parametrize(
    "sentence",
    [
        f"protocol id `{transport.PROTOCOL}`",
        f"unsigned, little-endian: 1 to {transport.MAX_HEADER_BYTES:,}",
        f"unsigned, little-endian: 0 to {transport.MAX_BODY_BYTES:,}",
        f"and {hand_over.MAX_PIECE_BYTES:,} on a stream that feeds",
        f"may have {inbound.MAX_STREAMS_PER_PEER} streams at another",
        f"no more than {admission.Limits().sessions_per_peer} sessions a peer",
        f"sessions a peer, and {admission.Limits().standbys_per_peer} standbys",
        f"copies {admission.Limits().copies_per_peer} sessions at most to the same peer",
        f"after {admission.Limits().idle:g} seconds without a step",
        f"{hosted.MAX_WAITING} may wait",
        f"leaves within {server.DRAIN_TIMEOUT:g} seconds",
        f"every {forms.BLOCK_VALUES} values of a token",
        f"pages of {PAGE_TOKENS} tokens",
        f"a key of {KEY_BYTES} bytes",
        f"at most {records.MAX_LIFETIME:,.0f} from now",
        f"at most {records.MAX_RECORD_BYTES:,} bytes in all",
        f"may differ by {records.CLOCK_SKEW:g} seconds",
        f"again every {announcer.PERIOD:g} seconds",
        f"to expire after {2 * announcer.PERIOD:g}",
        f"at the {keeping.REPLICAS} nearest nodes that answer",
        f"to more than {neighbours.PER_NETWORK} of one",
        f"{node_ids.MAX_NAMED} at most for a key",
        f"ids of keys, at most {search.KEYS_PER_CALL}",
        f"`{node_ids._DOMAIN.decode()}`",
        f"`{MODELS_KEY}`",
        f"one voucher for at least {vouchers.VOUCHED_ROWS} rows",
        f"the {len(vouchers._DOMAIN)} bytes `{vouchers._DOMAIN.decode()}`",
        f"`{vouchers._BEGIN.decode()}`",
        f"the {len(records._DOMAIN)} bytes `{records._DOMAIN.decode()}`",
        " ".join(f"`{key}`" for key in sorted(VOLATILE_KEYS)),
        f"`{shortcuts.PROTOCOL_SUFFIX}` after the id",
        f"of {shortcut_words.MAX_WORD_BYTES} bytes at most, is the word",
        f"ask | {shortcut_words.ASK.hex()} |",
        f"over | {shortcut_words.OVER.hex()} |",
        f"offer | {shortcut_words.Offer.new(1).word()[:1].hex()}, a TCP port",
        f"an id ({shortcut_words.ID_BYTES}), a key",
        f"what goes to the opener ({sealed_connection.KEY_BYTES})",
        f"holds {shortcut_port.OFFER_TIME:g} seconds",
        f"asks once {shortcut_turns.LIVELY_FRAMES} frames went over the stream, either way, with no more than"
        f" {shortcut_turns.LIVELY_PAUSE:g} seconds between them",
        f"1 to {sealed_connection.MAX_PIECE_BYTES:,} bytes sealed",
        f"{sealing.TAG_BYTES} more than they were",
    ],
)
def test_bounds_are_those_of_the_code(sentence: str) -> None:
    assert sentence in TEXT


def test_codecs_are_those_of_the_wire() -> None:
    told = {
        (dtype, codec.strip("`"))
        for dtypes, codec, _ in rows_after("Values are little-endian,")
        for dtype in dtypes.replace("`", "").split()
    }
    assert told == {("uint32", "raw"), *forms.FORMS}


def examples() -> list[str]:
    ping = messages.encode(messages.Ping(nonce=7))
    first = page_keys(range(32))
    identity = Identity(Ed25519PrivateKey.from_private_bytes(b"\x01" * 32))
    offer = Offer(1, b"\x01" * 16, to_acceptor=b"\x02" * 32, to_opener=b"\x03" * 32)
    return [
        (LENGTHS.pack(len(ping), 0) + ping).hex(),
        DHTID.generate(source=MODELS_KEY).to_bytes().hex(),
        first.hex(),
        page_keys(range(32, 64), parent=first).hex(),
        records.sign(identity, "m.0", b"\x80", 1e9).signature.hex(),
        identity.peer,
        node_id_of(base58.b58decode(identity.peer)).hex(),
        greeting(offer, PieceSeal(offer.to_acceptor)).hex(),
        fingerprint({"model_type": "m", "dtype": "x"}, {"a": sha256().hexdigest()}),
    ]


def test_examples_are_what_the_code_gives() -> None:
    assert [
        row[1].strip("`") for row in rows_after("To test an implementation against, in hex:")
    ] == examples()
