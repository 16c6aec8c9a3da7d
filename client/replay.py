"""Having other hops compute once more what went into one: the second opinion of an audit.

Brings inputs to hops one after the other, as work that nobody waits for, and collects what comes out of the
last. Must not know what it is compared with.
"""

import asyncio
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.client.faults import RemoteFault, blaming
from swarm.client.hop_stream import Deadlines
from swarm.client.inputs import Embed, Wired
from swarm.client.relay import PREFILL_CHUNK
from swarm.client.route import Hop
from swarm.client.testimony import Testimony
from swarm.kernels.codecs import from_wire, is_finite, to_wire
from swarm.kernels.imprint import Floats, projected
from swarm.net.calls import MessageStream
from swarm.net.forms import Wire, tensor_bytes
from swarm.net.messages import Close, Closed, Open, Opened, Result, Step
from swarm.net.transport import PeerId, Transport

BULK_PATIENCE = 4.0
"""How many times longer than any other step one may take that waits behind all others."""


@dataclass(frozen=True)
class Replay:
    """What went into some blocks, to be computed once more: `tokens`, or the hidden states `rows`.

    They are known where the blocks are not the first.
    """

    model_id: str
    hidden_size: int
    wire: Wire
    tokens: Sequence[int]
    rows: Wired | None

    @property
    def end(self) -> int:
        """How many positions there are."""
        return len(self.tokens) if self.rows is None else self.rows.shape[0]

    @property
    def bytes(self) -> int:
        """How much memory the inputs take."""
        return 0 if self.rows is None else len(self.rows.data)

    async def hidden(self, embed: Embed) -> Tensor:
        """What went in as hidden states [positions, hidden]."""
        return await embed(self.tokens) if self.rows is None else from_wire(*self.rows).float()


@dataclass(frozen=True)
class Opinion:
    """What `hops` made of the inputs, one after the other: the hidden states [positions, hidden] of the last.

    `kept` is what is compared of these. The `testimonies` tell what each hop gave and vouched for.
    """

    hops: tuple[Hop, ...]
    hidden: Tensor
    kept: Floats
    testimonies: tuple[Testimony, ...]

    @property
    def peers(self) -> set[PeerId]:
        return {hop.peer for hop in self.hops}


async def replayed(
    transport: Transport,
    hops: Sequence[Hop],
    replay: Replay,
    embed: Embed,
    deadlines: Deadlines,
    hidden: Tensor | None = None,
) -> Opinion:
    """What `hops` make of the inputs, or of `hidden` in their place.

    Raises:
        RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
    """
    if hidden is None and replay.rows is not None:
        hidden = await replay.hidden(embed)
    testimonies = []
    for hop in hops:
        with blaming(hop):
            stream = MessageStream(await transport.open_stream(hop.peer, hop.announcement.addresses))
            try:
                one = _Replaying(stream, hop, replay, deadlines)
                await one.open()
                if hidden is None and not one.takes_token_ids:
                    hidden = await replay.hidden(embed)
                hidden = await one.run(hidden)
                testimonies.append(await one.close())
            finally:
                stream.close()
    assert hidden is not None, "somebody is asked"
    kept = await asyncio.to_thread(projected, hidden.numpy())
    return Opinion(tuple(hops), hidden, kept, tuple(testimonies))


class _Replaying:
    """One hop's part of a replay, over `stream`."""

    def __init__(self, stream: MessageStream, hop: Hop, replay: Replay, deadlines: Deadlines):
        self._stream = stream
        self._hop = hop
        self._replay = replay
        self._deadlines = deadlines
        self._testimony: Testimony

    @property
    def takes_token_ids(self) -> bool:
        return self._testimony.opened.takes_token_ids and self._hop.span.start == 0

    async def open(self) -> None:
        span = self._hop.span
        asked = Open(
            session_id=secrets.token_hex(16),
            model_id=self._replay.model_id,
            start=span.start,
            end=span.end,
            max_tokens=self._replay.end,
            priority="bulk",
            wire=self._replay.wire,
            vouch=True,
        )
        opened, _ = await self._stream.call(asked, timeout=self._deadlines.open)
        if not isinstance(opened, Opened) or opened.held or opened.dtype == "uint32":
            raise RemoteFault(self._hop, "answered the opening of a session with something else")
        self._testimony = Testimony(self._hop, self._replay.model_id, opened.session_id, opened)

    async def run(self, hidden: Tensor | None) -> Tensor:
        """What the hop makes of hidden states [positions, hidden], or of the tokens without any."""
        chunk = min(self._testimony.opened.max_step_tokens, PREFILL_CHUNK)
        given = []
        for start in range(0, self._replay.end, chunk):
            end = min(start + chunk, self._replay.end)
            given.append(await self._step(None if hidden is None else hidden[start:end], start, end))
        return torch.cat(given)

    async def close(self) -> Testimony:
        asked = Close(session_id=self._testimony.session_id)
        answer, _ = await self._stream.call(asked, timeout=self._deadlines.close)
        if isinstance(answer, Closed) and answer.voucher is not None:
            self._testimony.vouch(answer.voucher)
        return self._testimony

    async def _step(self, hidden: Tensor | None, start: int, end: int) -> Tensor:
        opened, count = self._testimony.opened, end - start
        shape = count, self._replay.hidden_size
        if hidden is None:
            body: bytes | memoryview = struct.pack(f"<{count}I", *self._replay.tokens[start:end])
        else:
            body = to_wire(hidden, opened.dtype, opened.codec)
        step = Step(
            session_id=opened.session_id,
            number=start + 1,
            seq_pos=start,
            payload_type="token_ids" if hidden is None else "hidden_states",
            response_type="hidden_states",
            shape=(count,) if hidden is None else shape,
            dtype="uint32" if hidden is None else opened.dtype,
            codec="raw" if hidden is None else opened.codec,
        )
        result, data = await self._stream.call(
            step,
            body,
            timeout=self._deadlines.for_step(count) * BULK_PATIENCE,
            max_body=tensor_bytes(shape, opened.dtype, opened.codec),
        )
        given = Wired(data, shape, opened.dtype, opened.codec)
        if not isinstance(result, Result) or (result.shape, result.dtype, result.codec) != given[1:]:
            raise RemoteFault(self._hop, "answered a step with a result of another shape or kind")
        if not is_finite(*given):
            raise RemoteFault(self._hop, "answered with values that are not numbers")
        self._testimony.hear(start, count, given, result.vouchers)
        return from_wire(*given).float()
