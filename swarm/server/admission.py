"""Whether a message of a peer is admitted: pure decisions over what the peer asks and what this peer has.

Every rule of the protocol that a well-formed message can still break is here. Knows no streams, no
engine and no time; None means admitted, an `Error` is the answer to give instead.
"""

from dataclasses import dataclass

from swarm.dht.announcement import PeerState
from swarm.net.forms import ITEM_BYTES, Codec, Dtype, tensor_bytes
from swarm.net.messages import Error, ErrorCode, Open, Step, body_bytes, printable
from swarm.page_keys import KEY_BYTES, PAGE_TOKENS
from swarm.spans import Span

DRAINING_HINT = "This server is leaving the swarm: use another one."


@dataclass(frozen=True)
class Limits:
    """How much a peer may ask for. Times in seconds. Copies are those of sessions here to standbys there."""

    sessions_per_peer: int = 32
    standbys_per_peer: int = 16
    copies_per_peer: int = 16
    idle: float = 600.0
    send: float = 60.0
    retry_after: float = 5.0


@dataclass(frozen=True)
class Offer:
    """What this peer has for a session that is about to open; `left` is what it served before it moved."""

    model_id: str
    span: Span
    phase: PeerState
    loading_seconds: float
    sessions_of_peer: int
    standbys_of_peer: int = 0
    left: Span | None = None


@dataclass
class Terms:
    """What was agreed on when a session was opened, and how many tokens it holds by now.

    Steps may bring token ids instead of hidden states if `takes_token_ids`, and ask for one if
    `gives_token_ids`. It is a standby until it gets its first step.
    """

    session_id: str
    span: Span
    max_tokens: int
    hidden_size: int
    dtype: Dtype
    codec: Codec
    max_step_tokens: int
    takes_token_ids: bool = False
    gives_token_ids: bool = False
    is_standby: bool = False
    length: int = 0

    def samples(self, step: Step) -> bool:
        """Whether a token is to be sampled after the step, with which another round may begin."""
        is_asked = step.sampling is not None and step.response_type == "hidden_states"
        return is_asked and self.gives_token_ids

    @property
    def body_limit(self) -> int:
        """Bytes that the body of one step may have at most."""
        tokens = min(self.max_step_tokens, self.max_tokens)
        hidden = tensor_bytes((tokens, self.hidden_size), self.dtype, self.codec)
        return max(hidden, ITEM_BYTES["uint32"] * tokens) if self.takes_token_ids else hidden


def refuse_open(asked: Open, offer: Offer, limits: Limits) -> Error | None:
    """Why a session cannot be opened; whether its tokens fit is for the engine to say."""
    if asked.model_id != offer.model_id:
        return refusal(
            "model_mismatch", f"This server serves {offer.model_id}, not {printable(asked.model_id)}."
        )
    if asked.start >= asked.end or not offer.span.covers(Span(asked.start, asked.end)):
        if offer.left is not None and offer.left.covers(Span(asked.start, asked.end)):
            return refusal("draining", f"This server has gone on to blocks {offer.span}: use another one.")
        return refusal(
            "bad_request", f"This server serves blocks {offer.span}, not {asked.start}:{asked.end}."
        )
    fault = _fault_of_keys(asked.page_keys, asked.max_tokens // PAGE_TOKENS)
    if fault is not None:
        return refusal("bad_request", fault)
    if offer.phase == "joining":
        return refusal("warming_up", "This server is still loading its blocks.", offer.loading_seconds)
    if offer.phase != "serving":
        return refusal("draining", DRAINING_HINT)
    if asked.standby and offer.standbys_of_peer >= limits.standbys_per_peer:
        message = f"A peer may have {limits.standbys_per_peer} standbys here."
        return refusal("no_capacity", message, limits.retry_after)
    if not asked.standby and offer.sessions_of_peer >= limits.sessions_per_peer:
        message = f"A peer may have {limits.sessions_per_peer} sessions here: close one."
        return refusal("no_capacity", message, limits.retry_after)
    return None


def refuse_step(step: Step, body: int, terms: Terms) -> Error | None:
    """Why a step with a body of `body` bytes cannot be run in the session `terms`."""
    fault = _fault_of_form(step, body, terms) or _fault_of_place(step, terms)
    return refusal("bad_request", fault) if fault else None


def refusal(code: ErrorCode, message: str, retry_after: float | None = None) -> Error:
    return Error(code=code, message=message[:1000], retry_after=retry_after)


def _fault_of_form(step: Step, body: int, terms: Terms) -> str | None:
    if step.response_type == "logits":
        return "This server gives no logits: apply the head on the client."
    if step.response_type == "token_ids" and not terms.gives_token_ids:
        return "This session gives hidden states only: apply the head on the client."
    if step.rows > step.shape[0]:
        return f"A step of {step.shape[0]} tokens has no {step.rows} of them to answer for."
    if step.response_type == "token_ids" or terms.samples(step):
        if step.rounds and (step.rows or step.shape[0]) != 1:
            return "Another round begins with one token."
        if step.then and not step.rounds:
            return "What goes on to the next hop are the hidden states of all tokens."
    elif step.then and step.rows:
        return "What goes on to the next hop are the hidden states of all tokens."
    elif step.rounds and not step.then:
        return "Another round begins with a token, for which the last hop is to be asked."
    brings_ids = step.payload_type == "token_ids"
    fault = _fault_of_ids(step, terms) if brings_ids else _fault_of_hidden_states(step, terms)
    if fault is None and body != body_bytes(step):
        return f"A step of this shape has a body of {body_bytes(step)} bytes, not {body}."
    return fault


def _fault_of_ids(step: Step, terms: Terms) -> str | None:
    if not terms.takes_token_ids:
        return "This session takes hidden states only: embed on the client."
    if len(step.shape) != 1 or (step.dtype, step.codec) != ("uint32", "raw"):
        given = f"{step.dtype} {step.codec} {list(step.shape)}"
        return f"Token ids are uint32 raw in the shape [tokens], not {given}."
    return None


def _fault_of_hidden_states(step: Step, terms: Terms) -> str | None:
    if len(step.shape) != 2 or step.shape[1] != terms.hidden_size:
        return f"Hidden states have the shape [tokens, {terms.hidden_size}] here, not {list(step.shape)}."
    if (step.dtype, step.codec) != (terms.dtype, terms.codec):
        return f"This session agreed on {terms.dtype} {terms.codec}, not {step.dtype} {step.codec}."
    return None


def _fault_of_place(step: Step, terms: Terms) -> str | None:
    tokens, end = step.shape[0], step.seq_pos + step.shape[0]
    if tokens > terms.max_step_tokens:
        return f"A step may hold {terms.max_step_tokens} tokens at most, not {tokens}."
    if step.seq_pos > terms.length:
        return f"The session holds {terms.length} tokens: position {step.seq_pos} would leave a gap."
    if end > terms.max_tokens:
        return f"The session was opened for {terms.max_tokens} tokens, not {end}."
    return _fault_of_keys(step.page_keys, end // PAGE_TOKENS - step.seq_pos // PAGE_TOKENS)


def _fault_of_keys(keys: bytes, pages: int) -> str | None:
    """What is wrong with the keys of at most `pages` pages, filled one behind the other."""
    if len(keys) % KEY_BYTES:
        return f"Keys of pages have {KEY_BYTES} bytes each; {len(keys)} bytes are no whole number of them."
    if len(keys) > pages * KEY_BYTES:
        return f"There are {pages} full pages to name here at most, not {len(keys) // KEY_BYTES}."
    return None
