"""A voucher: what a hop signs of the rows that it gave, so that it cannot deny them later.

It names the inputs and the outputs by digests, and says how the hop claims to have computed. Whoever has the
inputs and the weights can check it. This module knows how vouchers are packed, bounded and signed, and how
rows are digested; what an imprint says is known elsewhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.errors import SwarmError
from swarm.net.forms import FORMS, Codec, Dtype, tensor_bytes
from swarm.net.identity import Identity, verify
from swarm.net.transport import PeerId

MAX_VOUCHER_BYTES = 1024
VOUCHED_ROWS = 32
"""Rows that a hop gives for each voucher; more where a step has more."""

DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
IMPRINT_BYTES = 256
_DOMAIN = b"swarm-voucher-v1"
_BEGIN = b"swarm-rows-v1"

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Kind: TypeAlias = Literal["hidden_states", "token_ids"]


class VoucherError(SwarmError):
    """A voucher cannot be believed."""


class Voucher(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """`peer` gave the rows of positions `[first, until)` out of blocks `[start, end)`, `at` some unix time.

    It claims to compute in `dtype` and `quantization`. `inputs` is the digest of all rows that went in at
    positions `[0, until)`, token ids if `brings_ids`; the first `held` were told by the key of their last
    page. `outputs` is the digest of the rows of `kind` that came out. Hidden states travelled as `wire_dtype`
    with `codec` both ways; those that came out left `imprint`, which is empty for token ids.
    """

    peer: Text
    model_id: Text
    start: Position
    end: Position
    dtype: Text
    quantization: Text
    session_id: Text
    wire_dtype: Dtype
    codec: Codec
    brings_ids: bool
    kind: Kind
    held: Position
    first: Position
    until: Position
    inputs: Digest
    outputs: Digest
    imprint: Annotated[bytes, msgspec.Meta(max_length=IMPRINT_BYTES)]
    at: float
    signature: Annotated[bytes, msgspec.Meta(max_length=SIGNATURE_BYTES)] = b""

    @property
    def rows(self) -> int:
        return self.until - self.first

    def signed(self, identity: Identity) -> "Voucher":
        return msgspec.structs.replace(self, signature=identity.sign(self._signed_bytes()))

    def is_signed(self) -> bool:
        """Whether the peer named in it has signed it."""
        return verify(PeerId(self.peer), self._signed_bytes(), self.signature)

    def pack(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def unpack(cls, packed: bytes) -> "Voucher":
        """
        Raises:
            VoucherError: it is none, or says what cannot be; its signature is not looked at.
        """
        if len(packed) > MAX_VOUCHER_BYTES:
            raise VoucherError(f"A voucher of {len(packed)} bytes is larger than is allowed.")
        try:
            voucher = _decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise VoucherError(f"A voucher cannot be read: {error}.") from error
        is_hidden = voucher.kind == "hidden_states"
        holds = (
            voucher.start < voucher.end
            and voucher.held <= voucher.first < voucher.until
            and (voucher.brings_ids or not voucher.held)
            and (voucher.wire_dtype, voucher.codec) in FORMS
            and math.isfinite(voucher.at)
            and len(voucher.imprint) == (IMPRINT_BYTES if is_hidden else 0)
        )
        if not holds:
            raise VoucherError("A voucher says what cannot be.")
        return voucher

    def _signed_bytes(self) -> bytes:
        return _encoder.encode((_DOMAIN, msgspec.structs.replace(self, signature=b"")))


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Voucher)


class Chain:
    """Digests of the rows of a sequence: of all before each position, from `held` on.

    What was held at the beginning is named by `key`. Rows can be cut off and added again.
    """

    def __init__(self, held: int = 0, key: bytes = b""):
        self.held = held
        self._digests = bytearray(blake2b(_BEGIN + key, digest_size=DIGEST_BYTES).digest())

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.held + len(self._digests) // DIGEST_BYTES - 1

    def at(self, position: int) -> bytes:
        """The digest of all rows before `position`, which is not after the end, nor before what was held."""
        start = (position - self.held) * DIGEST_BYTES
        return bytes(self._digests[start : start + DIGEST_BYTES])

    def cut(self, position: int) -> None:
        """Forget the rows from `position` on.

        Raises:
            ValueError: it lies within what was held.
        """
        if position < self.held:
            raise ValueError(f"position {position} lies within the {self.held} held")
        del self._digests[(position - self.held + 1) * DIGEST_BYTES :]

    def extend(self, rows: Iterable[bytes]) -> None:
        digest = bytes(self._digests[-DIGEST_BYTES:])
        for row in rows:
            digest = blake2b(digest + row, digest_size=DIGEST_BYTES).digest()
            self._digests += digest


def rows_of(data: memoryview | bytes, shape: tuple[int, ...], dtype: Dtype, codec: Codec) -> Iterator[bytes]:
    """The bytes of each row of a tensor on the wire: its scales, and its values."""
    rows, view = shape[0], memoryview(data).cast("B")
    values = tensor_bytes(shape, dtype, "raw") // rows
    scales = (len(view) - rows * values) // rows
    behind = rows * scales
    for row in range(rows):
        at = behind + row * values
        if scales:
            yield bytes(view[row * scales : (row + 1) * scales]) + bytes(view[at : at + values])
        else:
            yield bytes(view[at : at + values])


def tensor_of(rows: Sequence[bytes], width: int, dtype: Dtype, codec: Codec) -> bytes:
    """The tensor [rows, width] on the wire of which `rows_of` gives these rows; there is at least one."""
    scales = len(rows[0]) - tensor_bytes((1, width), dtype, "raw")
    if not scales:
        return b"".join(rows)
    return b"".join((*(row[:scales] for row in rows), *(row[scales:] for row in rows)))


def digest_of(rows: Iterable[bytes]) -> bytes:
    """The digest of rows that stand for themselves."""
    chain = Chain()
    chain.extend(rows)
    return chain.at(chain.end)


def row_hash(row: bytes) -> bytes:
    return blake2b(row, digest_size=DIGEST_BYTES).digest()
