"""Signed records: what a peer puts into the DHT under its own name, checked before anyone believes it.

A record carries everything needed to check it: its key, the peer that wrote it (whose id contains the
public key), when it expires, and a body. This module knows how records are packed, bounded, signed and
verified. It must not know what a body means, nor where records are kept.
"""

import math
from collections import OrderedDict
from hashlib import blake2b
from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.errors import SwarmError
from swarm.net.identity import Identity, verify
from swarm.net.transport import PeerId

MAX_KEY_CHARS = 256
MAX_BODY_BYTES = 8 * 1024
MAX_RECORD_BYTES = 10 * 1024
MAX_LIFETIME = 3600.0
"""Seconds a record may still have to live when it is seen."""

CLOCK_SKEW = 3.0
"""Seconds by which the clocks of two peers may differ."""

SIGNATURE_BYTES = 64
_DOMAIN = b"swarm-record-v1"

RecordFault: TypeAlias = Literal[
    "malformed",
    "too_large",
    "lives_too_long",
    "expired",
    "bad_signature",
    "bad_body",
    "not_its_own",
    "misplaced",
]


class RecordError(SwarmError):
    """A record cannot be believed. `fault` is one word to count it by."""

    def __init__(self, fault: RecordFault, message: str):
        super().__init__(message)
        self.fault: RecordFault = fault


class SignedRecord(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """One peer's entry under one key, packed as `[version, key, peer, expires_at, body, signature]`.

    `expires_at` is in unix seconds. Building one checks nothing; `unpack` checks form and size, `verify`
    the signature and the time.
    """

    key: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY_CHARS)]
    peer: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    expires_at: float
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_BODY_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

    @property
    def peer_id(self) -> PeerId:
        return PeerId(self.peer)

    def has_expired(self, now: float) -> bool:
        return now >= self.expires_at

    def pack(self) -> bytes:
        """The record's bytes.

        Raises:
            RecordError: `too_large`.
        """
        packed = _encoder.encode(self)
        if len(packed) > MAX_RECORD_BYTES or len(self.body) > MAX_BODY_BYTES:
            raise RecordError("too_large", f"A record of {len(packed)} bytes is larger than is allowed.")
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> "SignedRecord":
        """Read a record, checking form and size; nothing is said yet about who wrote it.

        Raises:
            RecordError: `too_large` or `malformed`.
        """
        if len(packed) > MAX_RECORD_BYTES:
            raise RecordError("too_large", f"A record of {len(packed)} bytes is larger than is allowed.")
        try:
            record = _decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RecordError("malformed", f"A record cannot be read: {error}.") from error
        if not math.isfinite(record.expires_at):
            raise RecordError("malformed", "A record expires at a time that is no number.")
        return record

    def verify(self, now: float) -> None:
        """Check that the peer named in it wrote this record and that it is valid at `now`, unix seconds.

        Raises:
            RecordError: `expired`, `lives_too_long` or `bad_signature`.
        """
        check_time(self, now)
        check_signature(self)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SignedRecord)


def sign(identity: Identity, key: str, body: bytes, expires_at: float) -> SignedRecord:
    """A record of `identity`'s own under `key`, expiring at `expires_at` in unix seconds.

    Raises:
        RecordError: key or body are larger than is allowed, or `expires_at` is not finite.
    """
    signature = identity.sign(_signed_bytes(key, identity.peer, expires_at, body))
    record = SignedRecord(key, identity.peer, expires_at, body, signature)
    return SignedRecord.unpack(record.pack())


def check_time(record: SignedRecord, now: float) -> None:
    """Raises RecordError `expired`, or `lives_too_long` past `MAX_LIFETIME` and the clock skew."""
    if record.has_expired(now):
        raise RecordError("expired", "A record has expired.")
    check_lifetime(record, now)


def check_lifetime(record: SignedRecord, now: float) -> None:
    """Raises RecordError `lives_too_long`; says nothing of a record that has expired."""
    if not record.expires_at <= now + MAX_LIFETIME + CLOCK_SKEW:
        raise RecordError("lives_too_long", "A record asks to be kept for longer than is allowed.")


def check_signature(record: SignedRecord) -> None:
    """Raises RecordError `bad_signature` unless the peer that the record names has signed it."""
    signed = _signed_bytes(record.key, record.peer, record.expires_at, record.body)
    if not verify(record.peer_id, signed, record.signature):
        raise RecordError("bad_signature", "A record was not signed by the peer that it names.")


def _signed_bytes(key: str, peer: str, expires_at: float, body: bytes) -> bytes:
    return _encoder.encode((_DOMAIN, key, peer, expires_at, body))


class SignatureMemory:
    """Remembers which packed records carried a good signature, so that each is checked once.

    The same record is met again at every replica and at every refresh, and checking a signature costs
    about 100 microseconds. Holds the digests of the last `capacity` good records.
    """

    def __init__(self, capacity: int = 8192):
        self._capacity = capacity
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def unpack(self, packed: bytes) -> SignedRecord:
        """The record in `packed`, its form, size and signature checked; its time is not.

        Raises:
            RecordError: `too_large`, `malformed` or `bad_signature`.
        """
        record = SignedRecord.unpack(packed)
        digest = blake2b(packed, digest_size=32).digest()
        if digest not in self._good:
            check_signature(record)
            self._good[digest] = None
        self._good.move_to_end(digest)
        if len(self._good) > self._capacity:
            self._good.popitem(last=False)
        return record
