"""What one hop gave a session, and vouched for: enough of it to be compared with what another computes.

Owns a hash and a projection of each row, or its token id, and the vouchers that name them. A voucher must fit
what was given. Must not know of the stream, nor who will compare.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from swarm.client.faults import RemoteFault
from swarm.client.inputs import Wired
from swarm.client.route import Hop
from swarm.kernels.codecs import from_wire
from swarm.kernels.imprint import Floats, difference, is_imprint, projected
from swarm.net.messages import Opened
from swarm.net.vouchers import Kind, Voucher, VoucherError, digest_of, row_hash, rows_of

OWN_IMPRINT = 1e-3
"""By how much the imprint of the same rows may differ between two machines, in the order of their sums."""


@dataclass(frozen=True)
class Given:
    """Rows of positions from `first` on: the hash of each, and what is kept of it, or the token ids."""

    first: int
    hashes: Sequence[bytes]
    kept: Floats | None = None
    ids: Sequence[int] = ()

    @property
    def until(self) -> int:
        return self.first + len(self.hashes)

    @property
    def kind(self) -> Kind:
        return "token_ids" if self.kept is None else "hidden_states"

    def part(self, first: int, until: int) -> "Given":
        """Of the positions `[first, until)`, those that it has."""
        first, until = max(first, self.first), min(until, self.until)
        cut = slice(first - self.first, max(until, first) - self.first)
        kept = None if self.kept is None else self.kept[cut]
        return Given(first, self.hashes[cut], kept, self.ids[cut])


@dataclass
class Testimony:
    """What `hop` gave since its session was opened, at positions that are still wanted.

    It is `whole` while all that the hop holds was brought to it: only then can others compute the same.
    `was_fed` tells whether the hop before brought any of it.
    """

    hop: Hop
    model_id: str
    session_id: str
    opened: Opened
    whole: bool = True
    was_fed: bool = False
    given: list[Given] = field(default_factory=list)
    vouchers: list[Voucher] = field(default_factory=list)

    @property
    def until(self) -> int:
        """The position after the last row that was given."""
        return self.given[-1].until if self.given else 0

    def copy(self) -> "Testimony":
        """The same as it is now, whatever else will be given."""
        return replace(self, given=list(self.given), vouchers=list(self.vouchers))

    def hear(self, start: int, tokens: int, result: Wired, packed: Iterable[bytes]) -> None:
        """A step of so many tokens from `start` on gave `result`, and vouchers with it.

        Raises:
            RemoteFault: a voucher is none, or not for what the hop gave.
        """
        self.cut(start)
        hashes = list(map(row_hash, rows_of(*result)))
        first = start + tokens - len(hashes)
        if result.dtype == "uint32":
            self.given.append(Given(first, hashes, ids=list(result.data.cast("B").cast("I"))))
        else:
            self.given.append(Given(first, hashes, projected(from_wire(*result).float().numpy())))
        for voucher in packed:
            self.vouch(voucher)

    def vouch(self, packed: bytes) -> None:
        """
        Raises:
            RemoteFault: it is no voucher of the hop's for what it gave.
        """
        try:
            voucher = Voucher.unpack(packed)
        except VoucherError as error:
            raise RemoteFault(self.hop, "sent a voucher that is none") from error
        if not (self._is_its_own(voucher) and voucher.is_signed()):
            raise RemoteFault(self.hop, "vouched for something else than it was asked")
        rows = self.rows(voucher.first, voucher.until, voucher.kind)
        if rows is None:
            return  # part of it was given to a step that nobody waits for any more
        if voucher.outputs != digest_of(rows.hashes) or not _left(voucher, rows):
            raise RemoteFault(self.hop, "vouched for other results than it gave")
        self.vouchers.append(voucher)

    def cut(self, position: int) -> None:
        """What was given from `position` on is not wanted any more."""
        while self.given and self.given[-1].first >= position:
            self.given.pop()
        if self.given and self.given[-1].until > position:
            self.given[-1] = self.given[-1].part(0, position)
        self.vouchers = [voucher for voucher in self.vouchers if voucher.until <= position]

    def rows(self, first: int, until: int, kind: Kind) -> Given | None:
        """What was given at the positions `[first, until)`; None unless all is there."""
        parts = [one.part(first, until) for one in self.given if one.kind == kind]
        parts = [part for part in parts if part.hashes]
        kept = [part.kept for part in parts if part.kept is not None]
        hashes = [one for part in parts for one in part.hashes]
        if not parts or parts[0].first != first or len(hashes) != until - first:
            return None
        ids = [one for part in parts for one in part.ids]
        return Given(first, hashes, np.concatenate(kept) if kept else None, ids)

    def _is_its_own(self, voucher: Voucher) -> bool:
        said, span = self.hop.announcement, self.hop.span
        return (
            voucher.peer == self.hop.peer
            and voucher.model_id == self.model_id
            and (voucher.start, voucher.end) == (span.start, span.end)
            and (voucher.dtype, voucher.quantization) == (said.dtype, said.quantization)
            and (voucher.wire_dtype, voucher.codec) == (self.opened.dtype, self.opened.codec)
            and voucher.session_id == self.session_id
            and voucher.held <= self.opened.held
        )


def _left(voucher: Voucher, rows: Given) -> bool:
    """Whether these rows left the voucher's imprint."""
    if rows.kept is None:
        return not voucher.imprint
    if not is_imprint(voucher.imprint):
        return False
    apart = difference(voucher.imprint, rows.kept, rows.first)
    return max(apart) <= OWN_IMPRINT
