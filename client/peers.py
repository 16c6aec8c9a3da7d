"""Who serves what, as people and scripts read it: the `peers` command and the library's `peers()`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.client.route import label
from swarm.dht.announcement import Announcement, ModelEntry
from swarm.dht.directory import list_models, list_peers
from swarm.dht.rtts import RoundTrips
from swarm.dht.store import RecordStore
from swarm.errors import InputError
from swarm.net.transport import Transport
from swarm.spans import Span


@dataclass(frozen=True)
class PeerReport:
    """One peer and the span that it announces. `rtt` is in seconds, None where it could not be measured."""

    announcement: Announcement
    model: str
    rtt: float | None

    @property
    def peer(self) -> str:
        return self.announcement.peer

    @property
    def label(self) -> str:
        return label(self.announcement)

    @property
    def span(self) -> Span:
        return self.announcement.span

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        said = self.announcement
        rates = said.throughput
        return {
            "peer": said.peer,
            "name": said.name,
            "model": self.model,
            "state": said.state,
            "blocks": list(said.span),
            "progress": said.progress,
            "asleep": said.asleep,
            "throughput": {"decode": rates.decode, "prefill": rates.prefill, "network": rates.network},
            "kv_tokens_left": said.kv_tokens_left,
            "rtt_ms": None if self.rtt is None else round(self.rtt * 1000, 3),
            "version": said.version,
        }


async def report_peers(
    transport: Transport, store: RecordStore, model: str | None = None
) -> list[PeerReport]:
    """All peers of all models in the swarm, or of those called `model`, with their round trips.

    Raises:
        StoreUnreachable: the records could not be read.
    """
    entries = [entry for entry in await list_models(store) if model in (None, *names(entry))]
    listed = [(entry, said) for entry in entries for said in await list_peers(store, entry)]
    round_trips = RoundTrips(transport)
    try:
        await round_trips.measure({said.peer_id: said.addresses for _, said in listed})
        return [PeerReport(said, entry.name, round_trips.rtt(said.peer_id)) for entry, said in listed]
    finally:
        round_trips.close()


def names(entry: ModelEntry) -> Iterable[str]:
    """What a person may call this model."""
    return entry.name, entry.repository, entry.model_id


def find_model(entries: Sequence[ModelEntry], name: str) -> ModelEntry:
    """The model that the swarm carries under `name`: its name, its repository, its id, or its folder's name.

    Raises:
        InputError: there is none, or there are several.
    """
    wanted = {name, Path(name).name}
    found = [entry for entry in entries if wanted & set(names(entry))]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(entry.model_id for entry in found)
        raise InputError(f"The swarm carries several models called {name}.", f"Give one by its id: {ids}.")
    if entries:
        carried = ", ".join(entry.name for entry in entries)
        raise InputError(f"The swarm carries no model {name}.", f"It carries: {carried}.")
    raise InputError(
        f"The swarm carries no model, nor {name}.",
        f"Start a server: python -m swarm.server --model {name}.",
    )
