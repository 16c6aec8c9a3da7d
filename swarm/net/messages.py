"""The messages of `/swarm/inference/1.0.0`, packed as msgpack, checked field by field on arrival.

A stream begins with what it is for. One that a client opens carries a session, or pings: `Open` is answered
by an `Opened`, each `Step` by a `Result`, `Link` by a `Linked`, `HandOver` by a `HandedOver`, `Mirror` by a
`Mirrored`, `Ping` by a `Pong`, `Observe` by an `Observed`, `DialBack` by a `DialledBack`, `Probe` by a
`Probed`, `Close` by a `Closed`; any of them may get an `Error` instead. Steps are answered in their order,
but need not wait for each other. Unasked, a hop says `Unfed`, `Leaving` and, where the session is a standby,
`Held`. Where it was asked to at the opening and agreed, it vouches for what it gives: some `Result`s, and
`Closed`, carry what `swarm.net.vouchers` packs.

A stream that a hop opens to the next one brings a session's steps there: `Feed` is answered by `Fed`, and the
`Step`s after it are answered to the client. Or it brings the KV memory of a session whose hop leaves, or that
has a standby here: each `Adopt` is answered by an `Adopted`.

`Step`, `Result` and `Adopt` are followed by a body of raw little-endian values, `Probe` and `Probed` by one
that means nothing.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.net.forms import Codec, Dtype, Wire, tensor_bytes
from swarm.net.transport import FrameError
from swarm.net.vouchers import MAX_VOUCHER_BYTES
from swarm.page_keys import KEY_BYTES
from swarm.sampling import Sampling

SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
ModelId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Shape = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=2)]

Number = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
AddressText = Annotated[str, msgspec.Meta(max_length=300)]
Addresses = Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=16)]

MAX_PROBE_BYTES = 2 * 1024 * 1024
"""Bytes that a peer may move at most, to and fro, in order to measure the way."""

ProbeSize = Annotated[int, msgspec.Meta(ge=0, le=MAX_PROBE_BYTES)]

MAX_HOPS = 64
"""Hops that one step may go through without its client."""

MAX_ROUNDS = 64
"""Tokens that hops go on by themselves to tell after one step."""

Rounds = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUNDS)]

MAX_ENDS = 16
"""Tokens of which none is gone on with."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31)]

MAX_PAGE_KEYS = 3_584
"""Keys that fit one header, for a prefix of 114,688 tokens."""

PageKeys = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * MAX_PAGE_KEYS)]
"""The keys of successive pages, one behind the other; see `swarm.page_keys`."""

PackedVoucher = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_VOUCHER_BYTES)]

PayloadType: TypeAlias = Literal["token_ids", "hidden_states"]
Priority: TypeAlias = Literal["interactive", "bulk"]
ResponseType: TypeAlias = Literal["hidden_states", "logits", "token_ids"]
ErrorCode: TypeAlias = Literal[
    "warming_up",
    "no_capacity",
    "draining",
    "unknown_session",
    "bad_request",
    "model_mismatch",
    "not_allowed",
    "internal",
]


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """A header. Unknown fields are ignored, so that a later 1.x may add some."""


class Ping(Message, frozen=True, tag="ping"):
    """Asks for a `Pong` at once; the time between is the round trip."""

    nonce: Position


class Pong(Message, frozen=True, tag="pong"):
    """`taken` is the number of the newest step that the stream's session has taken up, 0 before the first.

    What is answered by then was sent before.
    """

    nonce: Position
    taken: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class Observe(Message, frozen=True, tag="observe"):
    """Asks for an `Observed` at once: how the peer sees the one that asks."""

    nonce: Position


class Observed(Message, frozen=True, tag="observed"):
    """The asking peer's connection comes from the multiaddr `address`, empty if that is not known.

    `clock` is what the answering peer's shows, in unix seconds, `version` that of its software.
    """

    nonce: Position
    address: AddressText
    clock: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    version: Annotated[str, msgspec.Meta(max_length=100)]


class DialBack(Message, frozen=True, tag="dial_back"):
    """Asks whether the machine that this connection comes from can be connected to on TCP `port`."""

    nonce: Position
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class DialledBack(Message, frozen=True, tag="dialled_back"):
    """Whether a peer answered at `address`, to which a connection of its own was tried."""

    nonce: Position
    address: AddressText
    is_reached: bool


class Probe(Message, frozen=True, tag="probe"):
    """Measures the way: a body of `size` bytes comes along, and one of `back` bytes is to come back.

    Both together may be no more than the last `Probed` allowed; the first one brings nothing along.
    """

    nonce: Position
    size: ProbeSize = 0
    back: ProbeSize = 0


class Probed(Message, frozen=True, tag="probed"):
    """The answer to a probe, with a body of `size` bytes. Further probes may move `allowed` bytes."""

    nonce: Position
    size: ProbeSize
    allowed: ProbeSize


class Open(Message, frozen=True, tag="open"):
    """Open a session on blocks `[start, end)` that will hold at most `max_tokens`.

    It begins with what the hop has kept of the pages named by `page_keys`, the sequence's first ones.
    Activations are to travel as `wire` says. The hop is to `vouch` for what it gives, if it can. A `standby`
    is filled by another hop (`Mirror`) until it gets its first step, and gives way to sessions that are none.
    """

    session_id: SessionId
    model_id: ModelId
    start: Position
    end: Count
    max_tokens: Count
    page_keys: PageKeys = b""
    priority: Priority = "interactive"
    wire: Wire = "exact"
    vouch: bool = False
    standby: bool = False


class Opened(Message, frozen=True, tag="opened"):
    """The session exists. Activations travel as `dtype` with `codec`, at most `max_step_tokens` a step.

    It holds its first `held` tokens already, and its first step may begin anywhere up to there. Steps may
    bring token ids instead of hidden states if `takes_token_ids`, and ask for some if `gives_token_ids`. The
    hop `vouches` for what it gives. It `mirrors`: it knows standbys, and can give and take copies of
    sessions. It `goes_round`: it knows the `rounds` of steps. It `samples`: it knows their `sampling`.
    """

    session_id: SessionId
    dtype: Dtype
    codec: Codec
    max_step_tokens: Count
    held: Position = 0
    takes_token_ids: bool = False
    gives_token_ids: bool = False
    vouches: bool = False
    mirrors: bool = False
    goes_round: bool = False
    samples: bool = False


class Onward(msgspec.Struct, frozen=True, array_like=True):
    """What the next hop is asked to do with a step's result; as the fields of `Step`."""

    session_id: SessionId
    response_type: ResponseType
    rows: Position
    page_keys: PageKeys


class Step(Message, frozen=True, tag="step"):
    """Run `shape[0]` tokens from position `seq_pos` on, forgetting what the session held from there.

    Token ids are u32 in the shape [tokens]. The answer is for the last `rows` of the tokens, or all of them
    if 0: their hidden states, or the likeliest token after each. `page_keys` name the pages that the step
    fills, in order, so that they can be found again; empty where they need not be, or where the tokens tell.

    Steps are numbered upwards: one whose `number` is not above that of a step that was taken up before is
    ignored, since it came twice. If there is a `then`, its first is what the linked hop is asked to do with
    the result, and the others what the hops after that one are; the client gets its answer all the same.

    After the last hop's token, which is linked to the first, so many `rounds` follow that the hops go by
    themselves: each with the token that was told last, its `number` one higher, asked of every hop as this
    one was. None follows a token of `ends`. With `sampling` the last hop is asked for hidden states, and goes
    on with the token that it samples so.
    """

    session_id: SessionId
    number: Number
    seq_pos: Position
    payload_type: PayloadType
    response_type: ResponseType
    shape: Shape
    dtype: Dtype
    codec: Codec = "raw"
    page_keys: PageKeys = b""
    rows: Position = 0
    then: Annotated[tuple[Onward, ...], msgspec.Meta(max_length=MAX_HOPS)] = ()
    rounds: Rounds = 0
    ends: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_ENDS)] = ()
    sampling: Sampling | None = None


class Result(Message, frozen=True, tag="result"):
    """What a step gave, and where its time on the hop went. `pushed`: the linked hop was sent it too.

    `token` is what the hop has sampled after it, if it was asked to, and what another round begins with.
    The `vouchers` are for rows that were given up to here, each for some dozens.
    """

    session_id: SessionId
    number: Number
    seq_pos: Position
    response_type: ResponseType
    shape: Shape
    dtype: Dtype
    codec: Codec = "raw"
    queue_ms: Milliseconds = 0.0
    compute_ms: Milliseconds = 0.0
    pushed: bool = False
    token: TokenId | None = None
    vouchers: Annotated[tuple[PackedVoucher, ...], msgspec.Meta(max_length=2)] = ()


class Link(Message, frozen=True, tag="link"):
    """Let steps go on from here to `peer`, where the same client's session `to_session` runs the next blocks.

    That one takes activations as `dtype` with `codec`. A new link takes the place of the one before.
    """

    session_id: SessionId
    peer: PeerText
    addresses: Addresses
    to_session: SessionId
    dtype: Dtype
    codec: Codec


class Linked(Message, frozen=True, tag="linked"):
    session_id: SessionId


class Feed(Message, frozen=True, tag="feed"):
    """The steps of session `session_id` will come over this stream; knowing its id is the right to."""

    session_id: SessionId


class Fed(Message, frozen=True, tag="fed"):
    session_id: SessionId


class Unfed(Message, frozen=True, tag="unfed"):
    """The stream that fed the session has ended: what it had not brought by then must be brought again."""

    session_id: SessionId


class Leaving(Message, frozen=True, tag="leaving"):
    """The hop leaves the swarm soon: the session is to be handed over, or opened elsewhere, by then."""

    session_id: SessionId


class HandOver(Message, frozen=True, tag="hand_over"):
    """Give what the session holds to `to_session`, which the client has opened at `peer` for it."""

    session_id: SessionId
    peer: PeerText
    addresses: Addresses
    to_session: SessionId


class HandedOver(Message, frozen=True, tag="handed_over"):
    """The other session holds the first `tokens` of this one."""

    session_id: SessionId
    tokens: Position


class Mirror(Message, frozen=True, tag="mirror"):
    """Copy what the session holds to its standby `to_session` at `peer`, page after page, from now on.

    A new one takes the place of the one before.
    """

    session_id: SessionId
    peer: PeerText
    addresses: Addresses
    to_session: SessionId


class Mirrored(Message, frozen=True, tag="mirrored"):
    """The standby was reached, and copying begins."""

    session_id: SessionId


class Adopt(Message, frozen=True, tag="adopt"):
    """The KV of positions `[first, end)`, `size` bytes of body, for a session that holds `first` tokens.

    A standby may hold more, which it forgets. `taken` is the number of the newest step that the session which
    is copied had taken up, 0 before the first.
    """

    session_id: SessionId
    first: Position
    end: Count
    size: Count
    taken: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class Adopted(Message, frozen=True, tag="adopted"):
    session_id: SessionId


class Held(Message, frozen=True, tag="held"):
    """The standby holds the first `tokens` tokens, as the session that it copies did after step `taken`."""

    session_id: SessionId
    tokens: Position
    taken: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Close(Message, frozen=True, tag="close"):
    session_id: SessionId


class Closed(Message, frozen=True, tag="closed"):
    """The session has ended; the `voucher` is for what it gave that no other one was for."""

    session_id: SessionId
    voucher: PackedVoucher | None = None


class Error(Message, frozen=True, tag="error"):
    """Why a message was refused; the step of that `number`, if there is one.

    `retry_after` is in seconds and set where waiting helps.
    """

    code: ErrorCode
    message: Annotated[str, msgspec.Meta(max_length=1000)]
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None
    number: Number | None = None


AnyMessage: TypeAlias = (
    Ping
    | Pong
    | Observe
    | Observed
    | DialBack
    | DialledBack
    | Probe
    | Probed
    | Open
    | Opened
    | Step
    | Result
    | Link
    | Linked
    | Feed
    | Fed
    | Unfed
    | Leaving
    | HandOver
    | HandedOver
    | Mirror
    | Mirrored
    | Adopt
    | Adopted
    | Held
    | Close
    | Closed
    | Error
)

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


def body_bytes(message: AnyMessage) -> int:
    """How many bytes of body must follow."""
    match message:
        case Step() | Result():
            return tensor_bytes(message.shape, message.dtype, message.codec)
        case Adopt() | Probe() | Probed():
            return message.size
    return 0


def printable(text: str, max_characters: int = 300) -> str:
    """`text` of a peer made safe for a terminal and a log: one line, no control characters, not too long."""
    return "".join(character if character.isprintable() else " " for character in text[:max_characters])
