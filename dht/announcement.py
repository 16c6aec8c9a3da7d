"""The announcement: what a peer says of itself under each block it serves, checked on arrival.

Also the entry of a model in the list of models. Knows what the bodies of records say and where they
belong; not how they travel, nor what is made of them.
"""

import unicodedata
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

from swarm.dht.records import RecordError, SignedRecord
from swarm.net.transport import PeerId
from swarm.spans import Span

PeerState: TypeAlias = Literal["joining", "serving", "draining", "left"]
Mobility: TypeAlias = Literal["fixed", "settled", "free"]
"""What a server would change its blocks for: nothing, a block that nobody serves, or also more throughput."""

MAX_BLOCKS = 1_000
"""The deepest models of today have under 200; a reader looks for one key a block."""

MAX_NEIGHBOURS = 64
MAX_ADDRESSES = 16

Block = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Steps = Annotated[float, msgspec.Meta(ge=0, le=2.0**40)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
ShortText = Annotated[str, msgspec.Meta(max_length=100)]
Address = Annotated[str, msgspec.Meta(max_length=300)]


class Throughput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Measured rates. Zero means not measured yet.

    `decode` and `prefill` are in blocks a second for one token: how many (token, block) pairs the
    server computes each second when decoding one session and when prefilling a long prompt.
    `network` is in bytes a second.
    """

    decode: Rate = 0.0
    prefill: Rate = 0.0
    network: Rate = 0.0


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """One peer serves one span of one model.

    `progress` is the loaded fraction of the shard. A peer that is joining and `asleep` loads it when
    somebody asks for a session. `rtts` are round trips in seconds from this peer to peers that hold the
    blocks after its own. `queue` are the steps that it has now, `mean_queue` those that it had on average
    over the last seconds.

    A server that `serves_on` has memory to load other blocks beside its own, and serves these meanwhile. One
    that is about to serve other blocks instead `goes_to` those, half-open like its own; to its own ones if it
    is about to leave them for another model. While it is `undecided`, it may still choose otherwise: it
    joins, or goes, where it says unless others came before it.
    """

    peer: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    start: Block
    end: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    state: PeerState
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    asleep: bool = False
    throughput: Throughput = Throughput()
    kv_tokens_left: Tokens = 0
    queue: Tokens = 0
    mean_queue: Steps | None = None
    dtype: ShortText = "float32"
    quantization: ShortText = "none"
    adapters: Annotated[tuple[ShortText, ...], msgspec.Meta(max_length=16)] = ()
    name: ShortText = ""
    version: ShortText = ""
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()
    relayed: bool = False
    rtts: Annotated[dict[str, Seconds], msgspec.Meta(max_length=MAX_NEIGHBOURS)] = {}
    mobility: Mobility = "fixed"
    serves_on: bool = False
    undecided: bool = False
    goes_to: tuple[Block, Block] | None = None

    def __post_init__(self) -> None:
        if self.start >= self.end or (self.goes_to is not None and self.goes_to[0] >= self.goes_to[1]):
            raise ValueError("an announced span is empty")

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)

    @property
    def peer_id(self) -> PeerId:
        return PeerId(self.peer)

    @property
    def queued(self) -> float:
        """The steps that a new one will find in the queue, as far as is announced."""
        return self.queue if self.mean_queue is None else self.mean_queue


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model that a swarm carries, as listed under `_swarm.models`."""

    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    name: ShortText
    repository: Annotated[str, msgspec.Meta(max_length=300)] = ""
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    fingerprint: Annotated[str, msgspec.Meta(max_length=128)]


MODELS_KEY = "_swarm.models"

Body = TypeVar("Body", Announcement, ModelEntry)


def block_key(model_id: str, block: int) -> str:
    return f"{model_id}.{block}"


def announcement_from(record: SignedRecord) -> Announcement:
    """The announcement in a verified record, its texts fit for a terminal.

    Raises:
        RecordError: `bad_body`; `not_its_own`, it speaks of another peer; or `misplaced`, its key is not
            that of a block of its span.
    """
    announcement = _decode(_announcements, record)
    if announcement.peer != record.peer:
        raise RecordError("not_its_own", "A peer announced another peer.")
    if record.key not in (block_key(announcement.model_id, block) for block in announcement.span.blocks):
        raise RecordError("misplaced", "An announcement lies under the key of a block that it does not name.")
    return msgspec.structs.replace(
        announcement,
        dtype=clean(announcement.dtype),
        quantization=clean(announcement.quantization),
        adapters=tuple(map(clean, announcement.adapters)),
        name=clean(announcement.name),
        version=clean(announcement.version),
        addresses=tuple(address for address in announcement.addresses if is_clean(address)),
    )


def model_entry_from(record: SignedRecord) -> ModelEntry:
    """The entry of a model in a verified record, its texts fit for a terminal.

    Raises:
        RecordError: `bad_body` or `misplaced`.
    """
    entry = _decode(_model_entries, record)
    if record.key != MODELS_KEY:
        raise RecordError("misplaced", "The entry of a model lies under another key than that of the models.")
    return msgspec.structs.replace(
        entry,
        name=clean(entry.name),
        repository=clean(entry.repository),
        fingerprint=clean(entry.fingerprint),
    )


def encode(value: Announcement | ModelEntry) -> bytes:
    """The body of a record."""
    return _encoder.encode(value)


def clean(text: str) -> str:
    """`text` without what could steer a terminal: control, format and unassigned characters, line ends."""
    return "".join(character for character in text if _is_plain(character))


def is_clean(text: str) -> bool:
    return all(map(_is_plain, text))


def _is_plain(character: str) -> bool:
    return unicodedata.category(character) not in _STEERING


_STEERING = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))  # categories of Unicode
_encoder = msgspec.msgpack.Encoder()
_announcements = msgspec.msgpack.Decoder(Announcement)
_model_entries = msgspec.msgpack.Decoder(ModelEntry)


def _decode(decoder: msgspec.msgpack.Decoder[Body], record: SignedRecord) -> Body:
    try:
        body = decoder.decode(record.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError("bad_body", f"What a record says cannot be read: {error}.") from error
    if not is_clean(body.model_id):
        raise RecordError("bad_body", "The id of a model holds control characters.")
    return body
