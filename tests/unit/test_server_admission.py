"""Admission: each rule of the protocol that a well-formed message can break."""

import re
from dataclasses import replace

import pytest
from msgspec.structs import replace as changed

from swarm.net.messages import Onward, Open, Step
from swarm.sampling import Sampling
from swarm.server.admission import Limits, Offer, Terms, refuse_open, refuse_step
from swarm.spans import Span

SESSION = "0" * 32
OPEN = Open(session_id=SESSION, model_id="m", start=2, end=4, max_tokens=10)
OFFER = Offer(model_id="m", span=Span(2, 4), phase="serving", loading_seconds=3.0, sessions_of_peer=0)
LIMITS = Limits(sessions_per_peer=2)
TERMS = Terms(
    session_id=SESSION,
    span=Span(2, 4),
    max_tokens=10,
    hidden_size=3,
    dtype="float32",
    codec="raw",
    max_step_tokens=4,
    length=8,
)
GIVING = replace(TERMS, gives_token_ids=True)
STEP = Step(
    session_id=SESSION,
    number=1,
    seq_pos=8,
    payload_type="hidden_states",
    response_type="hidden_states",
    shape=(2, 3),
    dtype="float32",
)


SAMPLING = Sampling(0.7, None, 0.9, None, bytes(16))
ONWARD = (Onward("1" * 32, "token_ids", 1, b""),)


def test_what_fits_is_admitted() -> None:
    assert refuse_open(OPEN, OFFER, LIMITS) is None
    assert refuse_step(STEP, 24, TERMS) is None
    assert refuse_step(changed(STEP, rows=2), 24, TERMS) is None
    assert refuse_step(changed(STEP, then=ONWARD), 24, TERMS) is None
    assert refuse_step(changed(STEP, response_type="token_ids", rows=1), 24, GIVING) is None


@pytest.mark.parametrize(
    ("asked", "offer", "code", "retry_after"),
    [
        ({"model_id": "other"}, {}, "model_mismatch", None),
        ({"start": 0}, {}, "bad_request", None),
        ({"end": 5}, {}, "bad_request", None),
        ({"start": 4}, {}, "bad_request", None),
        ({"start": 3, "end": 3}, {}, "bad_request", None),
        ({"page_keys": bytes(17)}, {}, "bad_request", None),
        ({"page_keys": bytes(16)}, {}, "bad_request", None),
        ({"page_keys": bytes(48), "max_tokens": 95}, {}, "bad_request", None),
        ({"page_keys": bytes(17)}, {"phase": "joining"}, "bad_request", None),
        ({}, {"phase": "joining"}, "warming_up", 3.0),
        ({}, {"phase": "draining"}, "draining", None),
        ({}, {"phase": "left"}, "draining", None),
        ({}, {"sessions_of_peer": 2}, "no_capacity", LIMITS.retry_after),
        ({"model_id": "other"}, {"phase": "joining"}, "model_mismatch", None),
    ],
)
def test_opening_is_refused(
    asked: dict[str, object], offer: dict[str, object], code: str, retry_after: float | None
) -> None:
    error = refuse_open(changed(OPEN, **asked), replace(OFFER, **offer), LIMITS)  # type: ignore[arg-type]
    assert error is not None
    assert (error.code, error.retry_after) == (code, retry_after)


@pytest.mark.parametrize(
    ("step", "body", "code", "says"),
    [
        ({"payload_type": "token_ids"}, 24, "bad_request", "hidden states only"),
        ({"response_type": "logits"}, 24, "bad_request", "no logits"),
        ({"response_type": "token_ids"}, 24, "bad_request", "hidden states only"),
        ({"shape": (6,)}, 24, "bad_request", r"\[tokens, 3\]"),
        ({"shape": (2, 4)}, 32, "bad_request", r"\[tokens, 3\]"),
        ({"dtype": "float16"}, 12, "bad_request", "agreed on float32 raw"),
        ({"codec": "scaled"}, 32, "bad_request", "agreed on float32 raw"),
        ({}, 23, "bad_request", "24 bytes, not 23"),
        ({}, 0, "bad_request", "24 bytes, not 0"),
        ({"shape": (5, 3), "seq_pos": 0}, 60, "bad_request", "4 tokens at most"),
        ({"shape": (2**31, 3), "seq_pos": 0}, 12 * 2**31, "bad_request", "4 tokens at most"),
        ({"seq_pos": 9}, 24, "bad_request", "leave a gap"),
        ({"shape": (3, 3)}, 36, "bad_request", "opened for 10 tokens, not 11"),
        ({"page_keys": bytes(15)}, 24, "bad_request", "16 bytes each; 15"),
        ({"page_keys": bytes(16)}, 24, "bad_request", "0 full pages to name here at most, not 1"),
        ({"rows": 3}, 24, "bad_request", "2 tokens has no 3 of them"),
        ({"then": ONWARD, "rows": 1}, 24, "bad_request", "states of all tokens"),
        ({"then": ONWARD, "rows": 2}, 24, "bad_request", "states of all tokens"),
    ],
)
def test_a_step_is_refused(step: dict[str, object], body: int, code: str, says: str) -> None:
    error = refuse_step(changed(STEP, **step), body, TERMS)
    assert error is not None
    assert error.code == code
    assert re.search(says, error.message)


ROOMY = replace(TERMS, max_tokens=1000, max_step_tokens=64, length=100)


@pytest.mark.parametrize(
    ("seq_pos", "tokens", "pages"),
    [(0, 31, 0), (0, 32, 1), (31, 1, 1), (32, 31, 0), (33, 63, 2), (100, 28, 1), (95, 1, 1), (96, 1, 0)],
)
def test_a_step_names_no_more_pages_than_it_fills(seq_pos: int, tokens: int, pages: int) -> None:
    step = changed(STEP, seq_pos=seq_pos, shape=(tokens, 3), page_keys=bytes(16 * pages))
    assert refuse_step(step, 12 * tokens, ROOMY) is None
    one_more = changed(step, page_keys=bytes(16 * (pages + 1)))
    error = refuse_step(one_more, 12 * tokens, ROOMY)
    assert error is not None
    assert f"{pages} full pages" in error.message


def test_an_opening_names_pages_of_what_it_may_hold() -> None:
    assert refuse_open(changed(OPEN, page_keys=bytes(48), max_tokens=96), OFFER, LIMITS) is None


THIN = replace(TERMS, takes_token_ids=True)
IDS = changed(STEP, payload_type="token_ids", shape=(2,), dtype="uint32")


def test_token_ids_are_admitted_where_the_session_takes_them_beside_hidden_states() -> None:
    assert refuse_step(IDS, 8, THIN) is None
    assert refuse_step(STEP, 24, THIN) is None


@pytest.mark.parametrize(
    ("step", "body", "terms", "says"),
    [
        ({}, 8, TERMS, "hidden states only"),
        ({}, 7, THIN, "8 bytes, not 7"),
        ({}, 24, THIN, "8 bytes, not 24"),
        ({"shape": (2, 3)}, 24, THIN, r"shape \[tokens\], not uint32 raw \[2, 3\]"),
        ({"dtype": "float32"}, 8, THIN, "not float32 raw"),
        ({"codec": "scaled"}, 16, THIN, "not uint32 scaled"),
        ({"shape": (3,)}, 12, THIN, "opened for 10 tokens, not 11"),
        ({"shape": (5,), "seq_pos": 0}, 20, THIN, "4 tokens at most"),
        ({"seq_pos": 9}, 8, THIN, "leave a gap"),
    ],
)
def test_token_ids_are_refused(step: dict[str, object], body: int, terms: Terms, says: str) -> None:
    error = refuse_step(changed(IDS, **step), body, terms)
    assert error is not None
    assert error.code == "bad_request"
    assert re.search(says, error.message)


def test_what_goes_on_to_the_next_hop_are_no_token_ids() -> None:
    error = refuse_step(changed(STEP, response_type="token_ids", then=ONWARD), 24, GIVING)
    assert error is not None
    assert "states of all tokens" in error.message


def test_rounds_are_admitted() -> None:
    assert refuse_step(changed(STEP, then=ONWARD, rounds=3), 24, TERMS) is None
    last = changed(STEP, response_type="token_ids", rows=1, rounds=3)
    assert refuse_step(last, 24, GIVING) is None
    assert refuse_step(changed(last, then=ONWARD), 24, GIVING) is None
    assert refuse_step(changed(last, shape=(1, 3), rows=0), 12, GIVING) is None


def test_rounds_of_sampled_tokens_are_admitted_where_the_last_hop_can_choose() -> None:
    last = changed(STEP, rows=1, rounds=3, then=ONWARD, sampling=SAMPLING)
    assert refuse_step(last, 24, GIVING) is None
    assert refuse_step(changed(last, then=()), 24, GIVING) is None
    assert refuse_step(changed(last, rounds=0, then=()), 24, GIVING) is None
    nowhere = refuse_step(changed(last, rounds=0), 24, GIVING)
    assert nowhere is not None, "a round that was not asked for would begin with the token"
    assert GIVING.samples(last)
    assert not GIVING.samples(changed(last, response_type="token_ids"))
    before = changed(last, rows=0)
    assert refuse_step(before, 24, TERMS) is None
    assert not TERMS.samples(before)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"then": ONWARD, "rows": 1}, "states of all tokens"),
        ({}, "begins with a token"),
        ({"sampling": SAMPLING, "rows": 2}, "begins with one token"),
        ({"sampling": SAMPLING, "then": ONWARD}, "begins with one token"),
        ({"response_type": "token_ids"}, "begins with one token"),
        ({"response_type": "token_ids", "rows": 2, "then": ONWARD}, "begins with one token"),
    ],
)
def test_rounds_that_lead_nowhere_are_refused(step: dict[str, object], says: str) -> None:
    error = refuse_step(changed(STEP, rounds=1, **step), 24, GIVING)  # type: ignore[arg-type]
    assert error is not None
    assert error.code == "bad_request"
    assert says in error.message


def test_a_rollback_is_admitted() -> None:
    assert refuse_step(changed(STEP, seq_pos=0), 24, TERMS) is None


@pytest.mark.parametrize(
    ("terms", "limit"),
    [
        ({}, 4 * 3 * 4),
        ({"max_tokens": 2}, 2 * 3 * 4),
        ({"dtype": "float16", "codec": "scaled"}, 4 * 3 * 2 + 4 * 4),
        ({"takes_token_ids": True}, 4 * 3 * 4),
        ({"dtype": "float16", "hidden_size": 1, "takes_token_ids": True}, 4 * 4),
    ],
)
def test_the_body_limit_is_what_one_step_of_the_session_can_hold(
    terms: dict[str, object], limit: int
) -> None:
    assert replace(TERMS, **terms).body_limit == limit  # type: ignore[arg-type]


def test_a_long_name_of_a_peer_does_not_make_an_error_too_long() -> None:
    error = refuse_open(changed(OPEN, model_id="\x1b" * 128), replace(OFFER, model_id="m" * 128), LIMITS)
    assert error is not None
    assert len(error.message) <= 1000
    assert error.message.isprintable()
