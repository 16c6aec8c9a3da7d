"""What the shard cell must hold: an engine that runs a span for many sessions.

Fixes the words between hosting and computing, so that neither imports the other, and a fake can stand in.
"""

from collections.abc import Callable
from typing import Protocol

from swarm.net.forms import Codec, Dtype, Wire
from swarm.net.messages import Priority, ResponseType
from swarm.sampling import Sampling
from swarm.spans import Span


class StepOutcome(Protocol):
    """What an engine's step gives: raw little-endian values, and where the milliseconds went.

    `token` is what was sampled after the last row. `compute_ms` is what the hop worked on it, in three parts:
    `deserialise_ms`, `forward_ms`, `serialise_ms`.
    """

    @property
    def data(self) -> memoryview: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def token(self) -> int | None: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def compute_ms(self) -> float: ...
    @property
    def deserialise_ms(self) -> float: ...
    @property
    def forward_ms(self) -> float: ...
    @property
    def serialise_ms(self) -> float: ...


class WireForm(Protocol):
    """In which numbers activations travel."""

    @property
    def wire_dtype(self) -> Dtype: ...
    @property
    def codec(self) -> Codec: ...


class ShardForm(WireForm, Protocol):
    """In which numbers a shard is held (`name`), and its activations travel where that is to cost nothing."""

    @property
    def name(self) -> str: ...


class EngineStats(Protocol):
    """What an engine holds now: open sessions; all its KV pages, those in use, those kept for later."""

    @property
    def sessions(self) -> int: ...
    @property
    def kv_pages(self) -> int: ...
    @property
    def kv_pages_used(self) -> int: ...
    @property
    def kv_pages_cached(self) -> int: ...


class BatchReport(Protocol):
    """One iteration of an engine: how many steps it took up, with which tokens, and for how long.

    In all it computed `pairs` of a token and a block.
    """

    @property
    def steps(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def pairs(self) -> int: ...


class SpanEngine(Protocol):
    """What fills the cell: `swarm.blocks.engine.Engine`, or a fake in tests."""

    @property
    def precision(self) -> ShardForm: ...
    @property
    def shard_bytes(self) -> int: ...
    @property
    def max_step_tokens(self) -> int: ...
    @property
    def takes_token_ids(self) -> bool: ...
    @property
    def gives_token_ids(self) -> bool: ...
    @property
    def can_hand_over(self) -> bool: ...
    @property
    def kv_tokens_left(self) -> int: ...
    @property
    def queue(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...

    on_batch: Callable[[BatchReport], None] | None
    """Called on the event loop after each iteration."""

    def wire_form(self, wish: Wire) -> WireForm:
        """How activations of a session travel that wishes so."""
        ...

    def open_session(
        self,
        session_id: str,
        span: Span,
        max_tokens: int,
        *,
        client: str = "",
        page_keys: bytes = b"",
        priority: Priority = "interactive",
        wire: Wire = "exact",
    ) -> int:
        """Promise KV memory on blocks `span` of its own, for `client`, a peer; see `wire_form` for `wire`.

        Returns how many tokens it holds already, of those whose pages `page_keys` name. Raises NoCapacity,
        StepError.
        """
        ...

    async def step(
        self,
        session_id: str,
        seq_pos: int,
        data: memoryview,
        shape: tuple[int, ...],
        dtype: str,
        codec: str,
        *,
        page_keys: bytes = b"",
        response_type: ResponseType = "hidden_states",
        rows: int = 0,
        sampling: Sampling | None = None,
    ) -> StepOutcome:
        """Run hidden states [tokens, hidden], or ids [tokens] where `dtype` is uint32, from `seq_pos` on.

        `page_keys` name the pages that it fills. The answer is for the last `rows` tokens, or all if 0:
        hidden states [rows, hidden], or with token_ids as `response_type` the likeliest token after each,
        [rows]. With `sampling` a token is sampled after the last one besides. Raises NoCapacity, StepError.
        """
        ...

    def kv_bytes(self, session_id: str, tokens: int) -> int:
        """Bytes of the KV of so many tokens of the session, all its blocks. Raises StepError."""
        ...

    async def export_kv(self, session_id: str, first: int, end: int) -> memoryview:
        """The KV of positions `[first, end)`, which `import_kv` of an engine of the same dtype understands.

        No step of the session may run meanwhile. Raises StepError.
        """
        ...

    async def copy_kv(self, session_id: str, first: int, end: int) -> memoryview:
        """`export_kv` of full pages that the session holds, whatever runs. Raises NoCapacity, StepError.

        What they held when it was called is given.
        """
        ...

    def rewind(self, session_id: str, length: int) -> None:
        """Let the session forget what it holds from `length` on. No step of it may run. Raises StepError."""
        ...

    async def import_kv(self, session_id: str, first: int, end: int, data: memoryview) -> None:
        """Let a session that holds exactly `first` tokens hold `end`; what is refused changes nothing.

        No step of the session may run meanwhile. Raises NoCapacity, StepError.
        """
        ...

    def close_session(self, session_id: str) -> None:
        """Free the session's KV memory."""
        ...

    async def measure(self) -> tuple[float, float]:
        """Rates of decode and prefill, in (token, block) pairs a second."""
        ...

    def close(self) -> None:
        """Stop computing once the running step is done. Safe to call again."""
        ...

    async def wait_closed(self) -> None:
        """Return once a closed engine computes no more."""
        ...
