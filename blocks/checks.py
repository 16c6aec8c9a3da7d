"""Whether a step is what was agreed on: pure checks of everything that a peer can say about it."""

from typing import NamedTuple

from swarm.blocks.errors import StepError
from swarm.blocks.kv import SessionKV
from swarm.blocks.loading import LoadedSpan
from swarm.blocks.steps import Session

MAX_STEP_TOKENS = 2048
MAX_STEP_BYTES = 64 * 2**20


class StepForm(NamedTuple):
    """A step as a peer describes it."""

    seq_pos: int
    data: memoryview | bytes
    shape: tuple[int, ...]
    dtype: str
    codec: str
    response_type: str
    rows: int
    samples: bool = False


def max_step_tokens(loaded: LoadedSpan) -> int:
    """Tokens that one step on the span may bring at most."""
    token_bytes = loaded.hidden_size * loaded.precision.dtype.itemsize
    return max(1, min(MAX_STEP_TOKENS, MAX_STEP_BYTES // token_bytes))


def check_step(loaded: LoadedSpan, session: Session, step: StepForm, most: int) -> list[int] | None:
    """The token ids of a step of the session, `most` tokens at most, None if it brings hidden states.

    Raises:
        StepError: it is not of the form or at the place that was agreed on.
    """
    fault = _fault_of_form(loaded, session, step)
    fault = fault or _fault_of_place(session.kv, step, most)
    if fault is not None:
        raise StepError("bad_request", fault)
    if step.dtype != "uint32":
        return None
    ids: list[int] = memoryview(step.data).cast("B").cast("I").tolist()
    vocabulary = loaded.embedding.vocabulary if loaded.embedding else 0
    if max(ids) >= vocabulary:
        raise StepError("bad_request", f"This model has {vocabulary} tokens, not {max(ids) + 1}.")
    return ids


def gives_tokens(loaded: LoadedSpan, kv: SessionKV) -> bool:
    """Whether steps of the session may ask for the token after them."""
    return loaded.logits is not None and kv.blocks.end == loaded.span.size


def _fault_of_form(loaded: LoadedSpan, session: Session, step: StepForm) -> str | None:
    kv, wire = session.kv, session.wire
    if (step.response_type == "token_ids" or step.samples) and not gives_tokens(loaded, kv):
        return "Token ids are given by a server of the last block, for sessions that end there."
    if step.response_type not in ("token_ids", "hidden_states"):
        return "Steps are answered with hidden states or token ids here."
    if step.dtype == "uint32":
        if loaded.embedding is None or kv.blocks.start:
            return "Token ids are taken by a server of the first block, for sessions that begin there."
        if step.codec != "raw" or len(step.shape) != 1 or len(step.data) != 4 * step.shape[0]:
            return "Token ids have the shape [tokens] and travel raw, four bytes each."
    elif (step.dtype, step.codec) != (wire.wire_dtype, wire.codec):
        return f"Activations of this session travel as {wire.wire_dtype} {wire.codec}."
    elif len(step.shape) != 2 or step.shape[1] != loaded.hidden_size:
        return f"Hidden states have the shape [tokens, {loaded.hidden_size}] here."
    return None


def _fault_of_place(kv: SessionKV, step: StepForm, most: int) -> str | None:
    tokens = step.shape[0]
    if not 0 < tokens <= most:
        return f"A step may hold 1 to {most} tokens, not {tokens}."
    if not 0 <= step.rows <= tokens:
        return f"A step of {tokens} tokens cannot be answered for {step.rows}."
    if step.seq_pos > kv.length:
        return f"The session ends at position {kv.length}: {step.seq_pos} leaves a gap."
    if step.seq_pos + tokens > kv.capacity:
        return f"The session was opened for {kv.capacity} tokens."
    return None
