"""How batches are formed and paced: pure decisions."""

from dataclasses import dataclass

from swarm.blocks.batch import DECODE_ROWS, MAX_ROWS, PATIENCE, TURN_ROWS, Fairness, form_batch
from swarm.blocks.pace import ALONE_SECONDS, LEAST_ALONE, LEAST_ROWS, MOST_ROWS, STALL, Pace


@dataclass(eq=False)
class Asked:
    client: str
    rows: int
    arrived: float = 0.0
    is_bulk: bool = False
    session: str = ""

    @property
    def is_decode(self) -> bool:
        return self.rows <= DECODE_ROWS


def shares(
    *steps: Asked, room: int = 100, now: float = 0.0, fairness: Fairness | None = None
) -> list[tuple[str, int]]:
    batch = form_batch(steps, fairness or Fairness(), room, now)
    return [(share.step.client, share.rows) for share in batch]


def test_decode_goes_first_and_prefill_takes_what_room_is_left():
    assert shares(Asked("long", 500), Asked("a", 1), Asked("b", 4), room=64) == [
        ("a", 1),
        ("b", 4),
        ("long", 64),
    ]


def test_a_lone_step_goes_at_once():
    assert shares(Asked("a", 1)) == [("a", 1)]
    assert shares(Asked("a", 40), room=0) == [("a", 1)]
    assert shares() == []


def test_an_iteration_is_bounded():
    many = [Asked(str(i), DECODE_ROWS) for i in range(100)]
    assert sum(rows for _, rows in shares(*many, Asked("long", 500))) <= MAX_ROWS


def test_the_oldest_goes_first_among_clients_that_had_equal_shares():
    assert shares(Asked("late", 90, 2.0), Asked("early", 90, 1.0), room=90) == [("early", 90)]


def served(*prompts: Asked, room: int = 64) -> list[str]:
    """The sessions in whose order iterations take the prompts, those that follow each other once."""
    fairness, order, now = Fairness(), list[str](), 0.0
    waiting = list(prompts)
    while waiting:
        now += 0.1
        for share in form_batch([step for step in waiting if step.arrived <= now], fairness, room, now):
            share.step.rows -= share.rows
            if order[-1:] != [share.step.session]:
                order.append(share.step.session)
        waiting = [step for step in waiting if step.rows > 0]
    return order


def test_one_prompt_is_done_after_the_other():
    prompts = [Asked(f"client {name}", 300, session=name) for name in "abc"]
    assert served(*prompts) == ["a", "b", "c"]
    assert served(*(Asked("one client", 300, session=name) for name in "abc")) == ["a", "b", "c"]


def test_a_prompt_that_comes_in_steps_goes_on_where_it_was():
    fairness = Fairness()
    first, second = Asked("a", 100, session="a"), Asked("b", 100, session="b")
    assert shares(first, second, room=100, fairness=fairness, now=0.0) == [("a", 100)]
    after = Asked("a", 100, arrived=0.3, session="a")
    assert shares(second, after, room=100, fairness=fairness, now=0.3) == [("a", 100)]
    much_later = Asked("a", 100, arrived=9.0, session="a")
    assert shares(second, much_later, room=100, fairness=fairness, now=9.0) == [("b", 100)]


def test_a_long_prompt_makes_way():
    long, short = Asked("long", 4 * TURN_ROWS, session="long"), Asked("short", 100, 0.15, session="short")
    assert served(long, short) == ["long", "short", "long"]


def test_a_client_with_many_steps_does_not_starve_the_others():
    greedy = [Asked("greedy", TURN_ROWS, session=f"greedy {number}") for number in range(3)]
    assert served(*greedy, Asked("modest", TURN_ROWS, 0.2, session="modest"))[:2] == ["greedy 0", "modest"]


def test_who_comes_later_starts_level_and_not_ahead():
    fairness = Fairness()
    fairness.meet(["old"])
    fairness.give("old", 1000)
    fairness.meet(["old", "new"])
    assert fairness.given("new") == 1000
    fairness.meet(["new"])
    fairness.meet(["new", "old"])
    assert fairness.given("old") == 1000, "coming back is no advantage"


def test_who_decoded_alone_is_level_with_who_comes_then():
    fairness = Fairness()
    for _ in range(5):
        assert shares(Asked("alone", 1), fairness=fairness) == [("alone", 1)]
    early, late = Asked("alone", 90, 1.0), Asked("new", 90, 2.0)
    assert shares(late, early, room=90, now=3.0, fairness=fairness) == [("alone", 90)]


def test_bulk_waits_behind_interactive_work_but_not_for_ever():
    bulk, interactive = Asked("bulk", 300, 0.0, is_bulk=True), Asked("now", 300, 0.1)
    assert shares(bulk, interactive, room=50, now=0.2) == [("now", 50)]
    assert shares(bulk, interactive, room=50, now=PATIENCE) == [("bulk", 50)]
    assert shares(bulk, room=50) == [("bulk", 50)]


def test_prefill_beside_decoding_lengthens_an_iteration_by_the_stall_at_most():
    pace, row, one = Pace(), 0.002, 0.016
    for rows in (1, 8, 8, 8):
        pace.learn(rows, 0, one if rows == 1 else 0.020)
    for _ in range(60):
        rows = pace.prefill_rows(decoding=8)
        pace.learn(8, rows, 0.020 + row * rows)
    assert rows >= LEAST_ROWS
    assert 0.020 + row * rows <= max(STALL * 0.020, 0.020 + row * LEAST_ROWS)


def test_prefill_alone_takes_what_others_may_wait_for():
    pace, row = Pace(), 0.001
    pace.learn(1, 0, 0.016)
    for _ in range(60):
        rows = pace.prefill_rows(decoding=0)
        pace.learn(0, rows, 0.016 + row * rows)
    assert abs(row * rows - ALONE_SECONDS) < 0.1 * ALONE_SECONDS


def test_slow_iterations_do_not_shrink_chunks_for_ever():
    pace = Pace()
    pace.learn(1, 0, 0.016)
    for _ in range(20):
        pace.learn(0, pace.prefill_rows(0), 3.0)
    assert pace.prefill_rows(0) == LEAST_ALONE
    for _ in range(20):
        rows = pace.prefill_rows(0)
        pace.learn(0, rows, 0.016 + 0.0005 * rows)
    assert 200 < pace.prefill_rows(0) <= MOST_ROWS


def test_before_anything_ran_chunks_are_small():
    assert Pace().prefill_rows(decoding=3) == LEAST_ROWS
    assert Pace().prefill_rows(decoding=0) == LEAST_ALONE


def test_as_many_rows_are_quick_as_have_run_in_that_time() -> None:
    pace = Pace()
    assert pace.decode_rows(1.0) == 0, "nothing has run"
    for rows, seconds in ((1, 0.010), (5, 0.014), (8, 0.030)):
        pace.learn(rows, 0, seconds)
    assert [pace.decode_rows(seconds) for seconds in (0.005, 0.010, 0.015, 0.1)] == [0, 1, 7, 15]
