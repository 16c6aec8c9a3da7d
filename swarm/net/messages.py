"""The messages of `/swarm/inference/1.0.0`, packed as msgpack, checked field by field on arrival.

A stream carries one session, or pings. The client speaks first; every message gets exactly one
answer: `Open` an `Opened`, `Step` a `Result`, `Close` a `Closed`, `Ping` a `Pong`, and any of them
may get an `Error` instead. `Step` and `Result` are followed by a body of raw little-endian values.
"""

from math import prod
from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.net.transport import FrameError
from swarm.page_keys import KEY_BYTES

SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
ModelId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Shape = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=2)]

MAX_PAGE_KEYS = 3_584
"""Keys that fit one header, for a prefix of 114,688 tokens."""

PageKeys = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * MAX_PAGE_KEYS)]
"""The keys of successive pages, one behind the other; see `swarm.page_keys`."""

Dtype: TypeAlias = Literal["uint32", "float32", "bfloat16", "float16"]
Codec: TypeAlias = Literal["raw", "scaled"]
PayloadType: TypeAlias = Literal["token_ids", "hidden_states"]
Priority: TypeAlias = Literal["interactive", "bulk"]
ResponseType: TypeAlias = Literal["hidden_states", "logits", "token_ids"]
ErrorCode: TypeAlias = Literal[
    "warming_up", "no_capacity", "draining", "unknown_session", "bad_request", "model_mismatch", "internal"
]

ITEM_BYTES: dict[str, int] = {"uint32": 4, "float32": 4, "bfloat16": 2, "float16": 2}


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """A header. Unknown fields are ignored, so that a later 1.x may add some."""


class Ping(Message, frozen=True, tag="ping"):
    """Asks for a `Pong` at once; the time between is the round trip."""

    nonce: Position


class Pong(Message, frozen=True, tag="pong"):
    nonce: Position


class Open(Message, frozen=True, tag="open"):
    """Open a session on blocks `[start, end)` that will hold at most `max_tokens`.

    It begins with what the hop has kept of the pages named by `page_keys`, the sequence's first ones.
    """

    session_id: SessionId
    model_id: ModelId
    start: Position
    end: Count
    max_tokens: Count
    page_keys: PageKeys = b""
    priority: Priority = "interactive"


class Opened(Message, frozen=True, tag="opened"):
    """The session exists. Activations travel as `dtype` with `codec`, at most `max_step_tokens` a step.

    It holds its first `held` tokens already, and its first step may begin anywhere up to there. Steps may
    bring token ids instead of hidden states if `takes_token_ids`, and ask for one if `gives_token_ids`.
    """

    session_id: SessionId
    dtype: Dtype
    codec: Codec
    max_step_tokens: Count
    held: Position = 0
    takes_token_ids: bool = False
    gives_token_ids: bool = False


class Step(Message, frozen=True, tag="step"):
    """Run `shape[0]` tokens from position `seq_pos` on, forgetting what the session held from there.

    Token ids are u32 in the shape [tokens]; the one that is asked for is the likeliest after the last row,
    in the shape [1]. `page_keys` name the pages that the step fills, in order, so
    that they can be found again; empty where they need not be, or where the tokens tell.
    """

    session_id: SessionId
    seq_pos: Position
    payload_type: PayloadType
    response_type: ResponseType
    shape: Shape
    dtype: Dtype
    codec: Codec = "raw"
    page_keys: PageKeys = b""


class Result(Message, frozen=True, tag="result"):
    """What a step gave, and where its time on the hop went."""

    session_id: SessionId
    seq_pos: Position
    response_type: ResponseType
    shape: Shape
    dtype: Dtype
    codec: Codec = "raw"
    queue_ms: Milliseconds = 0.0
    compute_ms: Milliseconds = 0.0


class Close(Message, frozen=True, tag="close"):
    session_id: SessionId


class Closed(Message, frozen=True, tag="closed"):
    session_id: SessionId


class Error(Message, frozen=True, tag="error"):
    """Why a message was refused. `retry_after` is in seconds and set where waiting helps."""

    code: ErrorCode
    message: Annotated[str, msgspec.Meta(max_length=1000)]
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None


AnyMessage: TypeAlias = Ping | Pong | Open | Opened | Step | Result | Close | Closed | Error

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message)


def decode(header: bytes) -> AnyMessage:
    """Unpack and check a header.

    Raises:
        FrameError: it is not a message of this protocol version.
    """
    try:
        return _decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = printable(str(error))
        raise FrameError(f"A peer sent a message that is not of this protocol: {reason}.") from error


def body_bytes(message: Step | Result) -> int:
    """How many bytes of body must follow. `scaled` puts one float32 a token before the values."""
    scales = 4 * message.shape[0] if message.codec == "scaled" else 0
    return prod(message.shape) * ITEM_BYTES[message.dtype] + scales


def printable(text: str, max_characters: int = 300) -> str:
    """`text` of a peer made safe for a terminal and a log: one line, no control characters, not too long."""
    return "".join(character if character.isprintable() else " " for character in text[:max_characters])
