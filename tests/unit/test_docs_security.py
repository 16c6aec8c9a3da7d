"""docs/security.md against the code: the bounds that it promises."""

import pytest

from swarm.dht import keeping, node_storage, records
from swarm.net import inbound, shortcut_port, transport
from swarm.net.addresses import MAX_ADDRESSES
from swarm.net.messages import MAX_PROBE_BYTES
from swarm.page_keys import PAGE_TOKENS
from swarm.server import admission, hosted, sessions
from swarm.server.probes import PAUSE, PAUSE_OF_ALL
from tests.pages import ROOT, Page

TEXT = " ".join(Page(ROOT / "docs" / "security.md").text.split())
LIMITS = admission.Limits()


@pytest.mark.parametrize(
    "sentence",
    [
        f"A frame's header | {transport.MAX_HEADER_BYTES // 1024} KiB",
        f"Streams | {inbound.MAX_STREAMS_PER_PEER} of one peer, {inbound.MAX_STREAMS:,} in all",
        f"Sessions | {LIMITS.sessions_per_peer} of one peer",
        f"wait in a session | {hosted.MAX_WAITING}, and {hosted.MAX_WAITING_BYTES // 2**20} MiB",
        f"way here | {MAX_PROBE_BYTES // 2**20} MiB for one peer in {PAUSE / 60:g} minutes,"
        f" and for all together in {PAUSE_OF_ALL / 60:g}",
        f"without a step | {LIMITS.idle / 60:g} minutes",
        f"does not read its answers | {LIMITS.send / 60:g} minute",
        f"kept for others | {node_storage.MAX_STORED_RECORDS:,}, of {records.MAX_RECORD_BYTES // 1024} KiB",
        f"none outlives {records.MAX_LIFETIME / 60:g} minutes",
        f"{keeping.REPLICAS} of them keep each one",
        f"{sessions.WAYS_AT_ONCE} times at once and then twice a second",
        f"at most {MAX_ADDRESSES} a peer",
        f"in steps of {PAGE_TOKENS}",
        f"what they were offered | {shortcut_port.MAX_GREETING}, for {shortcut_port.GREETING_TIME:g} second,"
        f" of {shortcut_port.GREETING_BYTES} bytes each",
        f"Shortcuts | {shortcut_port.MAX_SHORTCUTS}, open or offered",
        f"an offer holds {shortcut_port.OFFER_TIME:g} seconds",
    ],
)
def test_bounds_are_those_of_the_code(sentence: str) -> None:
    assert sentence in TEXT
