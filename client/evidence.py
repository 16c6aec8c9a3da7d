"""Evidence: what a hop was brought, what it signed of what it gave, and who says that it is wrong.

Whoever has the weights can compute the same and see. Owns how evidence is packed, bounded and signed, and
what of it holds without computing anything. Evidence holds the inputs themselves, from which the text can be
told: it is for its owner to give away.
"""

import os
import struct
import time
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import msgspec

from swarm.client.inputs import Wired
from swarm.errors import InputError
from swarm.kernels.codecs import is_finite
from swarm.net.forms import tensor_bytes
from swarm.net.identity import Identity, verify
from swarm.net.transport import PeerId
from swarm.net.vouchers import Chain, Voucher, VoucherError, digest_of, row_hash, rows_of
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS, page_keys

MAX_EVIDENCE_BYTES = 512 * 2**20
_DOMAIN = b"swarm-evidence-v1"

Token = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Evidence(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """`auditor` says that what `voucher` vouches for is not what its inputs give.

    Those are `tokens`, or the hidden states `rows` as they travelled, of all positions up to the voucher's
    last. `ids` are the tokens that it told, if it told tokens.
    """

    voucher: bytes
    width: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    tokens: tuple[Token, ...]
    rows: bytes
    ids: tuple[Token, ...]
    auditor: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    at: float
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    def signed(self, identity: Identity) -> "Evidence":
        return msgspec.structs.replace(self, signature=identity.sign(self._signed_bytes()))

    def pack(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def unpack(cls, packed: bytes) -> "Evidence":
        """
        Raises:
            InputError: it is no evidence.
        """
        try:
            return _decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"This is no evidence: {error}.", "Give a file that an audit wrote.") from error

    def inputs(self, voucher: Voucher) -> Wired | None:
        """The hidden states that went in; None where token ids did."""
        if voucher.brings_ids:
            return None
        shape = (voucher.until, self.width)
        return Wired(memoryview(self.rows), shape, voucher.wire_dtype, voucher.codec)

    def checked(self) -> Voucher:
        """The voucher, which the accused has signed for these inputs.

        Raises:
            InputError: it does not hold together: whoever wrote it accuses nobody of anything.
        """
        try:
            voucher = Voucher.unpack(self.voucher)
        except VoucherError as error:
            raise InputError(f"The evidence is void: {error.message}") from error
        if not voucher.is_signed():
            raise InputError("The evidence is void: the peer that it accuses did not sign it.")
        if not verify(PeerId(self.auditor), self._signed_bytes(), self.signature):
            raise InputError("The evidence is void: the peer that accuses did not sign it.")
        if not self._is_of(voucher):
            raise InputError("The evidence is void: the peer that it accuses was brought something else.")
        return voucher

    def _is_of(self, voucher: Voucher) -> bool:
        came, tells_ids = self.inputs(voucher), voucher.kind == "token_ids"
        rows, tokens = (0, voucher.until) if came is None else (tensor_bytes(*came[1:]), 0)
        ids = voucher.rows if tells_ids else 0
        if (len(self.rows), len(self.tokens), len(self.ids)) != (rows, tokens, ids):
            return False
        if came is not None and not is_finite(*came):
            return False
        if not vouch_for([voucher], self.tokens, came):
            return False
        return not tells_ids or voucher.outputs == digest_of(map(row_hash, token_rows(self.ids)))

    def _signed_bytes(self) -> bytes:
        return _encoder.encode((_DOMAIN, msgspec.structs.replace(self, signature=b"")))


def save(evidence: Evidence, folder: Path) -> Path:
    """Write it to a file of its own, for this user alone to read (mode 0600), and return which.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packed = evidence.pack()
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(evidence.at))}-{row_hash(packed).hex()[:8]}.evidence"
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(packed)
    return folder / name


def load(path: Path) -> Evidence:
    """
    Raises:
        InputError: the file cannot be read, or is no evidence.
    """
    try:
        if path.stat().st_size > MAX_EVIDENCE_BYTES:
            raise InputError(f"The file {path} is too large to be evidence.")
        packed = path.read_bytes()
    except OSError as error:
        raise InputError(f"The evidence {path} cannot be read: {error.strerror}.") from error
    return Evidence.unpack(packed)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Evidence)


def vouch_for(vouchers: Iterable[Voucher], tokens: Sequence[int], rows: Wired | None) -> bool:
    """Whether vouchers are for these inputs: the hidden states `rows`, or `tokens` where there are none."""
    chains = cache(partial(_input_chain, tokens=tokens, rows=rows))
    return all(
        voucher.brings_ids == (rows is None) and chains(voucher.held).at(voucher.until) == voucher.inputs
        for voucher in vouchers
    )


def _input_chain(held: int, tokens: Sequence[int], rows: Wired | None) -> Chain:
    """The digests of what goes into a hop that has kept the first `held` tokens; see `Chain`."""
    if rows is not None:
        chain = Chain()
        chain.extend(rows_of(*rows))
        return chain
    whole = held // PAGE_TOKENS * PAGE_TOKENS
    chain = Chain(held, page_keys(tokens[:whole])[-KEY_BYTES:])
    chain.extend(token_rows(tokens[held:]))
    return chain


def token_rows(tokens: Iterable[int]) -> list[bytes]:
    return [struct.pack("<I", token) for token in tokens]
