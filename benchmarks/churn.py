"""Servers come and go while people talk: six servers, two for each third of the model, and eight clients.

    python -m benchmarks.churn [--minutes 20] [--seed N] [--polite] [--standby] [--anew] [--json FILE]

Each client answers its prompt undisturbed first, some greedily and some by sampling with a seed, and then
again and again, while every few seconds a server at random is killed with SIGKILL, its libp2p daemon too, and
started anew as another peer; never both that hold a third, so that sometimes there is none to kill. Every
answer must be the undisturbed one, to the token. `--polite` asks servers to leave (SIGTERM) instead; with
`--standby` servers copy what they hold to each other, so that less is computed again. A pause is the longest
time without news in an answer around the loss of a server that it ran on; what it is held against is how long
such a server takes, at that time, to prefill what it held. Servers are forked from a process that has
imported torch: on machines of their own they would not do that at the cost of others. With `--anew` each is
an interpreter of its own. Ends with a summary, and exit code 1 if an answer failed or differed.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
import uvloop

import swarm
from benchmarks.seats import Seat, Seats, seated
from benchmarks.servers import fork_server
from benchmarks.swarm import LONGEST, prompts_from
from benchmarks.talkers import Loss, Talker, Tally
from benchmarks.yardstick import span_prefill
from swarm.blocks.models import Model, resolve
from swarm.client.options import GenerationOptions, SamplingOptions
from swarm.errors import SwarmError
from swarm.processes import Launcher
from swarm.spans import Span

THIRDS = 3
HOLDERS = 2
PATIENCE = 60.0
"""Seconds for which a client looks for a route."""

PROBE_PERIOD = 15.0
AIM = 1.5, 1.0
"""Half of the pauses are at most so many times the prefill of what was lost, and seconds."""


@dataclass(frozen=True)
class Churn:
    """How long and how hard. Times in seconds; a server is lost every `period`, if one can be then."""

    seconds: float = 1200.0
    seed: int = 0
    model: str = "smollm2-135m"
    dtype: str = "float16"
    clients: int = 8
    tokens: int = 200
    period: float = 5.0
    polite: bool = False
    standby: bool = False


async def run(churn: Churn, logs: Path, launcher: Launcher | None) -> dict[str, Any]:
    """The summary of a whole run; what must not have happened is `broken`. Servers log to `logs`."""
    model = await asyncio.to_thread(resolve, churn.model)
    kv_tokens = churn.clients * (LONGEST + churn.tokens + 64) * 2
    options = ["--kv-tokens", str(kv_tokens), "--no-prefix-cache"]
    tally = Tally()
    async with (
        seated(model.name, churn.dtype, spans_of(model), logs, *options, launcher=launcher) as seats,
        talkers_of(model, churn, seats, tally) as talkers,
    ):
        started = time.monotonic()
        await asyncio.gather(*(talker.learn() for talker in talkers))
        undisturbed = churn.clients * churn.tokens / (time.monotonic() - started)
        _say(f"undisturbed: {undisturbed:.1f} tokens/s")
        tally.counts.clear()
        tally.journal_bytes.clear()
        started = time.monotonic()
        await disturb(model, churn, seats, talkers, tally)
        elapsed = time.monotonic() - started
    return summary(churn, seats, talkers, tally, undisturbed, elapsed)


def spans_of(model: Model) -> list[Span]:
    """The first holders of all thirds, then the second ones."""
    third = model.num_blocks // THIRDS
    edges = [0, third, 2 * third, model.num_blocks]
    return [Span(start, end) for start, end in pairwise(edges)] * HOLDERS


@asynccontextmanager
async def talkers_of(model: Model, churn: Churn, seats: Seats, tally: Tally) -> AsyncIterator[list[Talker]]:
    """Every other talker samples."""
    prompts = await asyncio.to_thread(prompts_from, model, churn.clients)
    async with AsyncExitStack() as stack:
        talkers = []
        for number, prompt in enumerate(prompts):
            joining = swarm.connect(
                seats.addresses, model.name, dtype=churn.dtype, timeout=PATIENCE, standby=churn.standby
            )
            client = await stack.enter_async_context(joining)
            sampling = SamplingOptions(temperature=0.8, seed=number) if number % 2 else SamplingOptions()
            options = GenerationOptions(churn.tokens, sampling, ignore_eos=True)
            talkers.append(Talker(number, client, prompt, options, tally))
        yield talkers


async def disturb(model: Model, churn: Churn, seats: Seats, talkers: Sequence[Talker], tally: Tally) -> None:
    """Let all talkers live for the time given while servers are lost; ends when the last answers have."""
    until = asyncio.get_running_loop().time() + churn.seconds
    async with asyncio.TaskGroup() as tasks:
        background = [
            tasks.create_task(lose_servers(churn, seats, talkers, tally), name="lose servers"),
            tasks.create_task(probe(model, churn, seats, talkers, tally), name="probe"),
        ]
        lives = [tasks.create_task(talker.live(until), name=f"client {talker.number}") for talker in talkers]
        await asyncio.wait(lives)
        for task in background:
            task.cancel()


async def lose_servers(churn: Churn, seats: Seats, talkers: Sequence[Talker], tally: Tally) -> None:
    """Lose a server each period, if one can be spared, and put another in its place, as long as this runs."""
    rng = random.Random(churn.seed)
    async with asyncio.TaskGroup() as tasks:
        while True:
            await asyncio.sleep(churn.period)
            spared = seats.can_lose()
            if not spared:
                continue
            seat = rng.choice(spared)
            tally.losses.append(loss_of(seat, talkers))
            tasks.create_task(lose(seat, seats, churn.polite, tally), name=f"lose {seat.name}")
            _say(f"{len(tally.losses)} lost, {dict(tally.counts)}, {len(tally.broken)} broken")


def loss_of(seat: Seat, talkers: Sequence[Talker]) -> Loss:
    assert seat.peer is not None
    held = {talker.number: talker.holds_on(seat.peer) for talker in talkers}
    on_it = {number: tokens for number, tokens in held.items() if tokens}
    return Loss(time.monotonic(), str(seat.span), on_it)


async def lose(seat: Seat, seats: Seats, politely: bool, tally: Tally) -> None:
    """End a seat's server and put new ones there until one serves; that it needs a second must not happen."""
    while True:
        try:
            await seat.end(politely=politely)
            await seats.refill(seat)
            return
        except (SwarmError, TimeoutError) as error:
            tally.broken.append(f"{seat.name}: {error!r}")
            politely = False


async def probe(model: Model, churn: Churn, seats: Seats, talkers: Sequence[Talker], tally: Tally) -> None:
    """See now and then how long a server takes to prefill what answers hold in their middle: one alone, and
    as many together as are lost with a server."""
    rng, tokens = random.Random(f"{churn.seed} probe"), tokens_probed(churn, talkers)
    while True:
        await asyncio.sleep(PROBE_PERIOD)
        seat = rng.choice([seat for seat in seats.all if seat.peer])
        assert seat.peer is not None
        prefill = partial(span_prefill, seat.peer, seat.addresses, model, seat.span, tokens)
        try:
            tally.prefills.append(await prefill())
            tally.mass_prefills.append(await prefill(max(round(tally.hit), 1)))
        except SwarmError as error:  # it may have been lost meanwhile, as many are here
            _say(f"no probe: {error}")


def tokens_probed(churn: Churn, talkers: Sequence[Talker]) -> int:
    return int(fmean(talker.prompt_tokens for talker in talkers)) + churn.tokens // 2


def summary(
    churn: Churn, seats: Seats, talkers: Sequence[Talker], tally: Tally, undisturbed: float, elapsed: float
) -> dict[str, Any]:
    """What was seen. Pauses in seconds, those of answers that a loss has hit."""
    pauses = [
        pause
        for loss in tally.losses
        for number in loss.held
        if (pause := talkers[number].pause(loss.at)) is not None
    ]
    prefill = median(tally.prefills) if tally.prefills else None
    times, more = AIM
    loads = [seconds for seat in seats.all for seconds in seat.loading_seconds[1:]]
    return {
        **asdict(churn),
        "losses": len(tally.losses),
        "seconds_between_losses": elapsed / max(len(tally.losses), 1),
        "seconds_to_serve_again": median(loads) if loads else None,
        "answers_hit": sum(len(loss.held) for loss in tally.losses),
        "counts": dict(sorted(tally.counts.items())),
        "tokens_per_s": {"undisturbed": undisturbed, "disturbed": tally.counts["tokens"] / elapsed},
        "pause_s": spread(pauses),
        "prefill_s": {
            "tokens": tokens_probed(churn, talkers),
            "measured": len(tally.prefills),
            "median": prefill,
            "sessions_together": round(tally.hit),
            "together_median": median(tally.mass_prefills) if tally.mass_prefills else None,
        },
        "pause_aim_s": prefill and times * prefill + more,
        "journal_bytes": max(tally.journal_bytes, default=0),
        "broken": tally.broken,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {name: value for value in values for name in ("median", "p95", "worst")}
    return {"median": median(values), "p95": quantiles(values, n=20)[-1], "worst": max(values)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    parser.add_argument("--clients", type=int, default=Churn.clients)
    parser.add_argument("--tokens", type=int, default=Churn.tokens, help="tokens of each answer")
    parser.add_argument("--dtype", default=Churn.dtype, help="of servers and clients; default: %(default)s")
    parser.add_argument("--period", type=float, default=Churn.period, help="seconds between losses")
    parser.add_argument("--polite", action="store_true", help="ask servers to leave instead of killing them")
    parser.add_argument("--standby", action="store_true", help="have servers copy sessions to each other")
    parser.add_argument("--anew", action="store_true", help="fork no servers: each imports what it needs")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    parser.add_argument("--logs", type=Path, default=Path("build/churn"), help="folder for the servers' logs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    churn = Churn(
        seconds=60 * args.minutes,
        seed=args.seed,
        dtype=args.dtype,
        clients=args.clients,
        tokens=args.tokens,
        period=args.period,
        polite=args.polite,
        standby=args.standby,
    )
    args.logs.mkdir(parents=True, exist_ok=True)
    with nullcontext() if args.anew else fork_server() as launcher:
        found = uvloop.run(run(churn, args.logs, launcher))
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
