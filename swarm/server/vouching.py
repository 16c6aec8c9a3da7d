"""What a hop vouches for: each row that it gives a session, a few dozen with one signature.

Owns the digests of what went in and the rows that no voucher names yet. Must not know how a step was
computed, nor whether anybody will ever look at a voucher.
"""

import time
from dataclasses import dataclass, field

from swarm.kernels.codecs import from_wire
from swarm.kernels.imprint import imprint, projected
from swarm.net.identity import Identity
from swarm.net.messages import Step
from swarm.net.vouchers import (
    VOUCHED_ROWS,
    Chain,
    Kind,
    Voucher,
    digest_of,
    row_hash,
    rows_of,
    tensor_of,
)
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.server.admission import Terms
from swarm.server.span_engine import StepOutcome

INLINE_BYTES = 256 * 1024
"""Up to so many bytes of a step are digested on the event loop: a thread would cost more."""


@dataclass(frozen=True)
class Form:
    """Of which model a hop runs blocks, and how it claims to compute them."""

    model_id: str
    dtype: str
    quantization: str


@dataclass
class Unnamed:
    """Rows of `kind` from position `first` on, as they travelled, that no voucher names yet."""

    first: int
    kind: Kind
    rows: list[bytes] = field(default_factory=list)

    @property
    def until(self) -> int:
        return self.first + len(self.rows)


class Vouching:
    """The vouchers of one session, which held the pages named by `keys` from its beginning.

    It ends for good where the session holds what it was not brought.
    """

    def __init__(self, identity: Identity, form: Form, terms: Terms, keys: bytes):
        self._identity = identity
        self._form = form
        self._terms = terms
        held = terms.length
        self._inputs: Chain | None = Chain(held, _key_of(keys, held))
        self._brings_ids: bool | None = None
        self._unnamed: Unnamed | None = None

    def on_step(self, step: Step, body: memoryview, done: StepOutcome) -> tuple[bytes, ...]:
        """The session took `body` and gave `done`: vouchers for it, if it is time for some."""
        self.cut(step.seq_pos)
        brings_ids = step.payload_type == "token_ids"
        if self._brings_ids not in (None, brings_ids):
            self.stop()
        if self._inputs is None:
            return ()
        self._brings_ids = brings_ids
        self._inputs.extend(rows_of(body, step.shape, step.dtype, step.codec))
        kind: Kind = "token_ids" if step.response_type == "token_ids" else "hidden_states"
        first = step.seq_pos + step.shape[0] - done.shape[0]
        vouchers = []
        waiting = self._unnamed
        if waiting is not None and (waiting.kind, waiting.until) != (kind, first):
            vouchers.append(self._name(waiting, self._inputs))
            waiting = None
        waiting = waiting or Unnamed(first, kind)
        waiting.rows += rows_of(done.data, done.shape, done.dtype, done.codec)
        self._unnamed = waiting
        if len(waiting.rows) >= VOUCHED_ROWS:
            vouchers.append(self._name(waiting, self._inputs))
        return tuple(vouchers)

    def cut(self, position: int) -> None:
        """The session forgets what it holds from `position` on."""
        if self._inputs is None:
            return
        if position == 0:
            self._inputs, self._brings_ids = Chain(), None
        elif position < self._inputs.held or position > self._inputs.end:
            self.stop()
            return
        else:
            self._inputs.cut(position)
        self._unnamed = _cut(self._unnamed, position)

    def stop(self) -> None:
        """The session holds what it was not brought: nothing of it can be vouched for from now on."""
        self._inputs = self._unnamed = None

    def last(self) -> bytes | None:
        """A voucher for the rows that none names yet; None where there are none."""
        if self._inputs is None or self._unnamed is None:
            return None
        return self._name(self._unnamed, self._inputs)

    def _name(self, rows: Unnamed, inputs: Chain) -> bytes:
        self._unnamed = None
        terms, form = self._terms, self._form
        voucher = Voucher(
            peer=self._identity.peer,
            model_id=form.model_id,
            start=terms.span.start,
            end=terms.span.end,
            dtype=form.dtype,
            quantization=form.quantization,
            session_id=terms.session_id,
            wire_dtype=terms.dtype,
            codec=terms.codec,
            brings_ids=bool(self._brings_ids),
            kind=rows.kind,
            held=inputs.held,
            first=rows.first,
            until=rows.until,
            inputs=inputs.at(rows.until),
            outputs=digest_of(map(row_hash, rows.rows)),
            imprint=self._imprint(rows) if rows.kind == "hidden_states" else b"",
            at=time.time(),
        )
        return voucher.signed(self._identity).pack()

    def _imprint(self, rows: Unnamed) -> bytes:
        width, dtype, codec = self._terms.hidden_size, self._terms.dtype, self._terms.codec
        data = tensor_of(rows.rows, width, dtype, codec)
        states = from_wire(data, (len(rows.rows), width), dtype, codec)
        return imprint(projected(states.float().numpy()), rows.first)


def _cut(rows: Unnamed | None, position: int) -> Unnamed | None:
    if rows is None or position >= rows.until:
        return rows
    count = position - rows.first
    if count <= 0:
        return None
    return Unnamed(rows.first, rows.kind, rows.rows[:count])


def _key_of(keys: bytes, held: int) -> bytes:
    """The key of the last of the held pages."""
    end = held // PAGE_TOKENS * KEY_BYTES
    return keys[max(0, end - KEY_BYTES) : end]
