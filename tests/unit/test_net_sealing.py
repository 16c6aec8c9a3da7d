"""Sealed calls: readable with the key in their place, and nowhere else."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.net.identity import Identity
from swarm.net.sealing import OVERHEAD_BYTES, Call, Seal, SealBroken
from swarm.net.swarm_key import SwarmKey

A, B, C = (Identity.from_seed(name).peer for name in "abc")
SEAL, SAME, OTHER = Seal(SwarmKey(b"s" * 32)), Seal(SwarmKey(b"s" * 32)), Seal(SwarmKey(b"o" * 32))
CALL = Call("find", A, B)


@given(st.binary(max_size=200))
def test_a_question_and_its_answer(data: bytes) -> None:
    question = SEAL.close(CALL, data)
    assert len(question) == len(data) + OVERHEAD_BYTES
    assert SAME.open(CALL, question) == data
    answer = SAME.close(CALL, data, answers=question)
    assert SEAL.open(CALL, answer, answers=question) == data


def test_nothing_is_readable_nor_twice_the_same() -> None:
    sealed = {SEAL.close(CALL, b"who serves what") for _ in range(3)}
    assert len(sealed) == 3
    assert not any(b"who" in one or b"what" in one for one in sealed)


@pytest.mark.parametrize(
    "call",
    [replace(CALL, name="store"), replace(CALL, caller=C), replace(CALL, callee=C), Call("find", B, A)],
)
def test_a_question_is_worth_nothing_elsewhere(call: Call) -> None:
    question = SEAL.close(CALL, b"x")
    with pytest.raises(SealBroken):
        SEAL.open(call, question)
    answer = SEAL.close(CALL, b"x", answers=question)
    with pytest.raises(SealBroken):
        SEAL.open(call, answer, answers=question)


def test_an_answer_belongs_to_its_question() -> None:
    one, two = SEAL.close(CALL, b"x"), SEAL.close(CALL, b"x")
    answer = SEAL.close(CALL, b"y", answers=one)
    for said, to in ((answer, two), (answer, b""), (one, one), (one, two)):
        with pytest.raises(SealBroken):
            SEAL.open(CALL, said, answers=to)


def test_another_key_opens_nothing() -> None:
    with pytest.raises(SealBroken):
        OTHER.open(CALL, SEAL.close(CALL, b"x"))


@given(st.data())
def test_a_damaged_message_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(SEAL.close(CALL, b"message"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SealBroken):
        SEAL.open(CALL, bytes(sealed))


@given(st.binary(max_size=100))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(SealBroken):
        SEAL.open(CALL, noise)
