"""What `benchmarks.wan` reports: who is compared, the figures of one distance, the aims, and the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.far import Way
from benchmarks.texts import echo
from swarm.client.generation import Generation

DRIVEN, PUSHED, SPECULATING = "client-driven", "push", "speculation"
CONTENDERS = {DRIVEN: (False, False), PUSHED: (True, False), SPECULATING: (True, True)}
"""Whether each lets hops push, and whether it speculates."""

OTHER, REPEATING, SAMPLED = "other", "repeating", "sampled"
"""Text that does not repeat its prompt, text that does, and the first again, but sampled."""

TURNS = (
    (DRIVEN, OTHER),
    (PUSHED, OTHER),
    (SPECULATING, OTHER),
    (PUSHED, REPEATING),
    (SPECULATING, REPEATING),
    (DRIVEN, SAMPLED),
    (PUSHED, SAMPLED),
)
STEP_AIM = 2.0, 60.0
"""A pushed step takes so many round trips and milliseconds at most."""

AIMED_AT = 100.0
"""The round trip in milliseconds for which the aims are set."""

AIMS = {"push_ratio": 0.7, "sampled_push_ratio": 0.7, "prefill_ratio": 0.55}
SPEED_AIMS = {REPEATING: 1.8, OTHER: 0.95}
TRANSPORT_AIM = 3.0

Prompts = Mapping[str, Sequence[list[int]]]
Expected = dict[tuple[str, int], tuple[int, ...]]


@dataclass(frozen=True)
class Asked:
    """Prompts by the kind of their text, and the answers that are expected, by kind and number."""

    prompts: Prompts
    expected: Expected


@dataclass
class Runs:
    """What one distance gave so far. Answers by contender, kind of text and the text's number."""

    answers: list[tuple[str, str, int, Generation]] = field(default_factory=list)
    prefills: list[tuple[float, float]] = field(default_factory=list)
    same_prefills: int = 0

    def of(self, contender: str, kind: str) -> list[Generation]:
        return [answer for who, what, _, answer in self.answers if (who, what) == (contender, kind)]

    def step_ms(self, contender: str, kind: str) -> list[float]:
        return [1000 / answer.tokens_per_s for answer in self.of(contender, kind)]

    def same(self, expected: Expected) -> int:
        """Answers that are the expected ones; what is not known yet is learnt from the first."""
        return sum(
            expected.setdefault((kind, number), answer.token_ids) == answer.token_ids
            for _, kind, number, answer in self.answers
        )


def row_of(way: Way | None, network: str, asked: Asked, runs: Runs, rtt: float) -> dict[str, Any]:
    """Medians; `rtt` is what the client measured, in seconds."""
    driven, pushed = runs.step_ms(DRIVEN, OTHER), runs.step_ms(PUSHED, OTHER)
    sampled = list(zip(runs.step_ms(PUSHED, SAMPLED), runs.step_ms(DRIVEN, SAMPLED), strict=True))
    prefills = runs.prefills
    return {
        "network": network,
        "rtt_ms": way.rtt_ms if way else 0.0,
        "mbit_s": way.mbit_s if way else None,
        "measured_rtt_ms": 1000 * rtt,
        "driven_ms": median(driven),
        "push_ms": median(pushed),
        "push_ratio": median(mine / its for mine, its in zip(pushed, driven, strict=True)),
        "sampled_push_ms": median(mine for mine, _ in sampled),
        "sampled_push_ratio": median(mine / its for mine, its in sampled),
        "first_ms": {name: median(one.ttft_ms for one in runs.of(name, OTHER)) for name in CONTENDERS},
        "speculation": {kind: speculation(runs, kind, asked) for kind in (REPEATING, OTHER)},
        "prefill_whole_s": median(whole for whole, _ in prefills),
        "prefill_s": median(pipelined for _, pipelined in prefills),
        "prefill_ratio": median(pipelined / whole for whole, pipelined in prefills),
        "answers": len(runs.answers) + len(prefills),
        "same": runs.same(asked.expected) + runs.same_prefills,
        "recoveries": sum(answer.recoveries for *_, answer in runs.answers),
    }


def speculation(runs: Runs, kind: str, asked: Asked) -> dict[str, float]:
    """Speed with speculation against without on one kind of text."""
    plain, drafted = runs.step_ms(PUSHED, kind), runs.step_ms(SPECULATING, kind)
    return {
        "plain_tokens_per_s": 1000 / median(plain),
        "tokens_per_s": 1000 / median(drafted),
        "speedup": median(its / mine for its, mine in zip(plain, drafted, strict=True)),
        "slowest": min(its / mine for its, mine in zip(plain, drafted, strict=True)),
        "echo": median(
            echo(prompt, asked.expected[kind, number])
            for number, prompt in enumerate(asked.prompts[kind])
            if (kind, number) in asked.expected
        ),
    }


def misses(result: dict[str, Any]) -> list[str]:
    """Where the figures fall short of the aims, and where answers differ."""
    said = []
    for row in result["rows"]:
        name = name_of(row)
        if row["same"] < row["answers"]:
            said.append(
                f"{name}: {row['answers'] - row['same']} answers differ from the plain ones on loopback"
            )
        for kind, step in row.get("step", {}).items():
            if kind != DRIVEN and (spent := step["transport_ms"]) > TRANSPORT_AIM:
                said.append(f"{name}, {kind}: transport takes {spent:.2f} ms, the aim is {TRANSPORT_AIM}")
        if row["rtt_ms"] == AIMED_AT:
            said += [f"{name}: {miss}" for miss in _misses_of(row)]
    return said


def _misses_of(row: dict[str, Any]) -> list[str]:
    trips, extra = STEP_AIM
    most = trips * row["rtt_ms"] + extra
    said = [
        f"{figure} is {row[figure]:.0f}, the aim is {most:.0f}"
        for figure in ("push_ms", "sampled_push_ms")
        if row[figure] > most
    ]
    said += [
        f"{figure} is {row[figure]:.2f}, the aim is {aim}"
        for figure, aim in AIMS.items()
        if row[figure] > aim
    ]
    speedups = {kind: row["speculation"][kind]["speedup"] for kind in SPEED_AIMS}
    return said + [
        f"speculation on {kind} text makes {speedups[kind]:.2f} of plain speed, the aim is {aim}"
        for kind, aim in SPEED_AIMS.items()
        if speedups[kind] < aim
    ]


def name_of(row: dict[str, Any]) -> str:
    return f"{row['rtt_ms']:g} ms, {row['mbit_s']:g} Mbit/s" if row["mbit_s"] else "loopback"


def show(result: dict[str, Any]) -> None:
    rows, tokens = result["rows"], result["long_prompt_tokens"]
    title = f"{result['model']}, {result['dtype']}: medians of {result['rounds']} rounds"
    table = Table(title=title)
    headings = (
        "driven (ms)",
        "push",
        "ratio",
        "sampled: push",
        "ratio",
        "repeats: plain (t/s)",
        "drafted",
        "x",
        "other: plain",
        "drafted",
        "x",
    )
    table.add_column("")
    for heading in (*headings, f"{tokens} whole (s)", "chunks", "ratio", "same"):
        table.add_column(heading, justify="right")
    for row in rows:
        drafted = [
            f"{row['speculation'][kind][figure]:.2f}"
            for kind in (REPEATING, OTHER)
            for figure in ("plain_tokens_per_s", "tokens_per_s", "speedup")
        ]
        steps = [f"{row['driven_ms']:.1f}"]
        for kind in ("push", "sampled_push"):
            steps += [f"{row[f'{kind}_ms']:.1f}", f"{row[f'{kind}_ratio']:.2f}"]
        prefill = (f"{row[figure]:.2f}" for figure in ("prefill_whole_s", "prefill_s", "prefill_ratio"))
        table.add_row(name_of(row), *steps, *drafted, *prefill, f"{row['same']} of {row['answers']}")
    console = Console(width=165)
    console.print(table)
    console.print(f"Distance: {rows[-1]['network']}; {result['cores']} cores.")
    for name, step in rows[0]["step"].items():
        console.print(
            f"loopback, {name}: a step of {step['step_ms']:.2f} ms computes {step['compute_ms']:.2f},"
            f" queues {step['queue_ms']:.2f}, travels {step['transport_ms']:.2f} ms; processor time:"
        )
        for kind, parts in step["cpu_ms_a_step"].items():
            console.print(f"  {kind}: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()))
