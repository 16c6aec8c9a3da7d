"""The page pool and the page tables: random lives of sessions, with the invariants after each move."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from swarm.blocks.kv import EVERYBODY, SessionKV, pages_of
from swarm.blocks.pool import PagePool, PoolExhausted
from swarm.page_keys import PAGE_TOKENS, page_keys, split_keys
from swarm.spans import Span

BLOCKS = Span(0, 2)
POOL_PAGES = 7
CAPACITY = 4 * PAGE_TOKENS
RARELY = st.sampled_from([False, False, False, True])


class Lives(RuleBasedStateMachine):
    """Sessions of several clients on one small pool.

    A page's content is modelled as the tokens written to it and by whom; whatever a session may read must be
    what it would have written itself.
    """

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.pool: PagePool[Any] = PagePool(POOL_PAGES)
        self.content: list[list[tuple[str, int] | None]] = [[None] * PAGE_TOKENS for _ in range(POOL_PAGES)]
        self.open: dict[int, tuple[SessionKV, list[tuple[str, int]]]] = {}
        self.count = 0

    def secret(self, owner: str) -> bytes:
        return owner.encode()

    @rule(target=sessions, client=st.sampled_from("ab"), public=st.booleans(), prompt=st.integers(0, 3))
    def open_session(self, client: str, public: bool, prompt: int) -> int:
        """Prompts have few beginnings, so that sessions meet."""
        kv = SessionKV(self.pool, BLOCKS, CAPACITY, client)
        tokens = [prompt // 2] * PAGE_TOKENS + [prompt] * PAGE_TOKENS
        owner = EVERYBODY if public else client
        held = kv.attach(page_keys(tokens, secret=self.secret(owner)), owner)
        assert held == kv.length <= len(tokens)
        self.count += 1
        self.open[self.count] = kv, [(owner, token) for token in tokens[:held]]
        return self.count

    @rule(
        session=sessions,
        back=st.integers(0, 70),
        tokens=st.integers(1, 70),
        token=st.integers(0, 3),
        by_ids=st.booleans(),
        is_named=st.booleans(),
        fails=RARELY,
    )
    def step(
        self, session: int, back: int, tokens: int, token: int, by_ids: bool, is_named: bool, fails: bool
    ) -> None:
        kv, written = self.open[session]
        first = max(0, len(written) - back)
        end = min(first + tokens, CAPACITY)
        if first == end:
            return
        owner = EVERYBODY if by_ids else kv.client
        new = [(owner, token)] * (end - first)
        whole = [entry for _, entry in written[:first]] + [token] * (end - first)
        all_keys = split_keys(page_keys(whole, secret=self.secret(owner)))
        keys = b"".join(all_keys[first // PAGE_TOKENS :]) if is_named else b""
        kv.expect(first, [token] * (end - first) if by_ids else None, keys)
        try:
            copies = kv.reserve(first, end)
        except PoolExhausted:
            assert self.pool.used + pages_of(end) - pages_of(first) >= POOL_PAGES
            del written[first:]
            return
        for copy in copies:
            self.content[copy.target] = list(self.content[copy.source])
        if fails:
            kv.roll_back(first)
            del written[first:]
            return
        for position, entry in zip(range(first, end), new, strict=True):
            page = kv.table[position // PAGE_TOKENS]
            self.content[page][position % PAGE_TOKENS] = entry
        kv.grow(end)
        written[first:] = new

    @rule(session=sessions, tokens=st.integers(1, 70), token=st.integers(0, 3), fails=RARELY)
    def adopt(self, session: int, tokens: int, token: int, fails: bool) -> None:
        """Take in what another server computed, which nobody else may ever read."""
        kv, written = self.open[session]
        first, end = kv.length, min(kv.length + tokens, CAPACITY)
        if first == end:
            return
        try:
            copies = kv.reserve(first, end)
        except PoolExhausted:
            return
        for copy in copies:
            self.content[copy.target] = list(self.content[copy.source])
        for position in range(first, end):
            page = kv.table[position // PAGE_TOKENS]
            self.content[page][position % PAGE_TOKENS] = (f"adopted by {session}", token)
        if fails:
            kv.roll_back(first)
            return
        kv.adopt(end)
        written += [(kv.client, token)] * (end - first)

    @rule(session=consumes(sessions))
    def close_session(self, session: int) -> None:
        kv, _ = self.open.pop(session)
        kv.roll_back(0)
        assert not kv.table

    @precondition(lambda self: not self.open)
    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        assert self.pool.used == self.pool.kept == 0

    @invariant()
    def pages_are_counted(self) -> None:
        self.pool.check_integrity(kv.table for kv, _ in self.open.values())

    @invariant()
    def tables_fit_lengths(self) -> None:
        for kv, written in self.open.values():
            assert kv.length == len(written)
            assert len(kv.table) == pages_of(kv.length)

    @invariant()
    def sessions_read_what_they_wrote(self) -> None:
        for session, (kv, written) in self.open.items():
            owners = EVERYBODY, kv.client, f"adopted by {session}"
            for position, entry in enumerate(written):
                page = kv.table[position // PAGE_TOKENS]
                found = self.content[page][position % PAGE_TOKENS]
                assert found is not None
                assert found[1] == entry[1], "a session reads tokens that it did not write"
                assert found[0] in owners, "a session reads what another client wrote"

    @invariant()
    def what_others_computed_has_no_name(self) -> None:
        for page in self.pool._names:
            writers = {entry[0] for entry in self.content[page] if entry is not None}
            assert not any(writer.startswith("adopted") for writer in writers)


Lives.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLives = pytest.mark.filterwarnings("default")(Lives.TestCase)


def kv_of(pool: PagePool[Any], client: str = "a") -> SessionKV:
    return SessionKV(pool, BLOCKS, CAPACITY, client)


def write(kv: SessionKV, tokens: list[int], first: int = 0, secret: bytes | None = b"s") -> None:
    """A step of these tokens; `secret` None if the server sees them."""
    if secret is None:
        kv.expect(first, tokens, b"")
    else:
        kv.expect(first, None, page_keys(tokens, secret=secret) if first == 0 else b"")
    kv.reserve(first, first + len(tokens))
    kv.grow(first + len(tokens))


PROMPT = list(range(2 * PAGE_TOKENS + 5))


def test_a_prefix_is_found_again_after_its_session_has_gone() -> None:
    pool: PagePool[Any] = PagePool(6)
    first = kv_of(pool)
    write(first, PROMPT)
    first.roll_back(0)
    assert (pool.used, pool.kept) == (0, 2), "full pages stay, the last one does not"
    second = kv_of(pool)
    assert second.attach(page_keys(PROMPT, secret=b"s"), "a") == 2 * PAGE_TOKENS
    assert kv_of(pool, "b").attach(page_keys(PROMPT, secret=b"s"), "b") == 0, "other clients do not get it"


def test_pages_whose_tokens_the_server_saw_are_everybodys() -> None:
    pool: PagePool[Any] = PagePool(6)
    write(kv_of(pool, "a"), PROMPT, secret=None)
    assert kv_of(pool, "b").attach(page_keys(PROMPT), EVERYBODY) == 2 * PAGE_TOKENS


def test_hidden_states_never_make_pages_for_everybody() -> None:
    pool: PagePool[Any] = PagePool(6)
    poisoner = kv_of(pool, "a")
    poisoner.expect(0, None, page_keys(PROMPT))
    poisoner.reserve(0, PAGE_TOKENS // 2)
    poisoner.grow(PAGE_TOKENS // 2)
    poisoner.expect(PAGE_TOKENS // 2, PROMPT[PAGE_TOKENS // 2 :], b"")
    poisoner.reserve(PAGE_TOKENS // 2, len(PROMPT))
    poisoner.grow(len(PROMPT))
    assert kv_of(pool, "b").attach(page_keys(PROMPT), EVERYBODY) == 0


def test_a_session_that_goes_on_in_a_shared_page_gets_its_own() -> None:
    pool: PagePool[Any] = PagePool(6)
    write(kv_of(pool), PROMPT, secret=None)
    second = kv_of(pool, "b")
    held = second.attach(page_keys(PROMPT), EVERYBODY)
    shared = second.table[-1]
    second.expect(held - 1, [PROMPT[held - 1], 7], b"")
    (copy,) = second.reserve(held - 1, held + 1)
    assert (copy.source, copy.target) == (shared, second.table[1])
    assert shared != second.table[1]


def test_what_follows_an_attached_prefix_is_found_too() -> None:
    pool: PagePool[Any] = PagePool(8)
    longer = [*PROMPT, *range(60)]
    write(kv_of(pool), PROMPT, secret=None)
    second = kv_of(pool, "b")
    held = second.attach(page_keys(longer), EVERYBODY)
    write(second, longer[held - 1 :], first=held - 1, secret=None)
    assert kv_of(pool, "c").attach(page_keys(longer), EVERYBODY) == len(longer) // PAGE_TOKENS * PAGE_TOKENS


def test_the_least_recently_used_page_goes_first_and_pages_in_use_never() -> None:
    pool: PagePool[Any] = PagePool(3)
    kept = [pool.take() for _ in range(2)]
    for name, page in enumerate(kept):
        pool.name(page, name)
        pool.release(page)
    used = pool.take()
    assert pool.take() == kept[0]
    assert pool.find(0) is None
    pool.share(kept[1])
    with pytest.raises(PoolExhausted):
        pool.take()
    assert used not in kept


def test_integrity_finds_what_is_wrong() -> None:
    pool: PagePool[Any] = PagePool(3)
    page = pool.take()
    pool.check_integrity([[page]])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    with pytest.raises(AssertionError):
        pool.check_integrity([[page], [page]])
