"""How long one server takes to prefill its span, as a peer sees it that has no other business there."""

import secrets
import time
from collections.abc import Sequence

import torch
from msgspec import structs

from swarm.blocks.models import Model
from swarm.client.concurrently import concurrently
from swarm.kernels.codecs import to_wire
from swarm.net.calls import MessageStream
from swarm.net.identity import Identity
from swarm.net.libp2p import Libp2pTransport
from swarm.net.messages import Open, Opened, Step
from swarm.net.transport import PeerId
from swarm.spans import Span

WAIT = 60.0
"""Seconds that an answer is waited for at most."""

MAX_ANSWER_BYTES = 2**24


async def span_prefill(
    peer: PeerId, addresses: Sequence[str], model: Model, span: Span, tokens: int, sessions: int = 1
) -> float:
    """Seconds that `tokens` hidden states take in each of so many new sessions, all at the same time.

    Raises:
        SwarmError: the server cannot be reached, or refuses.
    """
    async with await Libp2pTransport.start(
        Identity.generate(), initial_peers=addresses, host_maddrs=(), routes_for_others=False
    ) as transport:
        asked = Open(
            session_id="0" * 32, model_id=model.model_id, start=span.start, end=span.end, max_tokens=tokens
        )
        opened = []
        for _ in range(sessions):
            calls = MessageStream(await transport.open_stream(peer, addresses))
            answer, _ = await calls.call(
                structs.replace(asked, session_id=secrets.token_hex(16)), timeout=WAIT
            )
            assert isinstance(answer, Opened)
            opened.append((calls, answer))
        started = time.perf_counter()
        await concurrently(*(_prefill(calls, answer, model, tokens) for calls, answer in opened))
        return time.perf_counter() - started


async def _prefill(calls: MessageStream, opened: Opened, model: Model, tokens: int) -> None:
    longest = opened.max_step_tokens
    for number, start in enumerate(range(0, tokens, longest), start=1):
        step, body = _step(opened, model, start, min(longest, tokens - start), number)
        await calls.call(step, body, timeout=WAIT, max_body=MAX_ANSWER_BYTES)


def _step(opened: Opened, model: Model, seq_pos: int, tokens: int, number: int) -> tuple[Step, bytes]:
    """Noise for `tokens` positions from `seq_pos` on."""
    hidden = torch.randn(tokens, model.hidden_size)
    step = Step(
        session_id=opened.session_id,
        number=number,
        seq_pos=seq_pos,
        payload_type="hidden_states",
        response_type="hidden_states",
        shape=tuple(hidden.shape),
        dtype=opened.dtype,
        codec=opened.codec,
    )
    return step, bytes(to_wire(hidden, opened.dtype, opened.codec))
