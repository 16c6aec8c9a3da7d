"""All findings, in the order in which they are told: the nearest things first. A pure function."""

from collections.abc import Iterator

from swarm.client.diagnose.about_here import (
    about_clock,
    about_nat,
    about_network,
    about_reachability,
    about_versions,
)
from swarm.client.diagnose.about_peers import about_initial_peers, about_models, about_records
from swarm.client.diagnose.finding import Finding
from swarm.client.diagnose.seen import Seen


def findings(seen: Seen) -> list[Finding]:
    """What follows from all that was seen."""
    return list(_findings(seen))


def _findings(seen: Seen) -> Iterator[Finding]:
    yield from about_network(seen)
    yield from about_initial_peers(seen.initial)
    if seen.answering:
        yield from about_clock(seen.answering)
        yield from about_versions(seen.answering)
        yield from about_nat(seen)
        if seen.dialled_back is not None:
            yield from about_reachability(seen)
    if seen.records is not None:
        yield from about_records(seen.records)
    yield from about_models(seen)
    if seen.unfinished:
        yield Finding(
            "time",
            "problem",
            f"There was no time left for {seen.unfinished}.",
            "Give more with --timeout, or mend first what is said above.",
        )
    elif seen.network_error is None and not seen.answering:
        yield Finding(
            "time",
            "warning",
            "Nobody was reached, so that nothing else could be looked at: this machine's reachability and"
            " clock, the records, the models.",
            "Mend first what is said above.",
        )
