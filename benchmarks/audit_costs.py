"""What vouching costs: processor time for each step, and bytes on the wire for each token."""

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from swarm.client.inputs import Wired
from swarm.client.route import Hop
from swarm.client.testimony import Testimony
from swarm.dht.announcement import Announcement
from swarm.net.identity import Identity
from swarm.net.messages import Opened, Step
from swarm.net.vouchers import Voucher
from swarm.server.admission import Terms
from swarm.server.vouching import Form, Vouching
from swarm.spans import Span

SESSION = "1" * 32
STEPS = 96
WIDTHS = 576, 4096
PREFILL = 128


def vouching_costs() -> dict[str, Any]:
    """For rows of each width in float32: microseconds a row at the server and at a client that audits."""
    return {str(width): _costs(width) for width in WIDTHS}


def _costs(width: int) -> dict[str, Any]:
    identity = Identity.generate()
    found: dict[str, Any] = {}
    packed = b""
    for name, rows in (("decode", 1), ("prefill", PREFILL)):
        found[name], packed = _side(identity, width, rows)
    voucher = Voucher.unpack(packed)
    found["voucher_bytes"] = len(packed)
    found["sign_us"] = round(1e6 * _best(lambda: voucher.signed(identity)), 1)
    found["verify_us"] = round(1e6 * _best(voucher.is_signed), 1)
    return found


def _side(identity: Identity, width: int, rows: int) -> tuple[dict[str, float], bytes]:
    """Figures for steps of so many rows, and the last voucher."""
    form = "float32", "raw"
    said = Announcement(peer=identity.peer, model_id="m", start=0, end=1, state="serving")
    terms = Terms(SESSION, Span(0, 1), 2**20, width, *form, 4096)
    vouching = Vouching(identity, Form("m", "float32", "none"), terms, b"")
    opened = Opened(session_id=SESSION, dtype="float32", codec="raw", max_step_tokens=4096, vouches=True)
    testimony = Testimony(Hop(identity.peer, Span(0, 1), said), "m", SESSION, opened)
    values = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    wired = Wired(memoryview(values.tobytes()), (rows, width), *form)
    done: Any = SimpleNamespace(data=wired.data, shape=wired.shape, dtype="float32", codec="raw")
    serving = hearing = 0.0
    vouchers: list[bytes] = []
    for at in range(STEPS):
        step = Step(
            session_id=SESSION,
            number=at + 1,
            seq_pos=at * rows,
            payload_type="hidden_states",
            response_type="hidden_states",
            shape=(rows, width),
            dtype="float32",
        )
        packed, seconds = _timed(partial(vouching.on_step, step, wired.data, done))
        serving += seconds
        _, seconds = _timed(partial(testimony.hear, at * rows, rows, wired, packed))
        hearing += seconds
        vouchers += packed
    total = STEPS * rows
    figures = {
        "server_us_a_row": round(1e6 * serving / total, 1),
        "auditing_client_us_a_row": round(1e6 * hearing / total, 1),
        "voucher_bytes_a_row": round(sum(map(len, vouchers)) / total, 1),
    }
    return figures, vouchers[-1]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    done = work()
    return done, time.process_time() - begun


def _best(work: Callable[[], Any], rounds: int = 200) -> float:
    return min(_timed(work)[1] for _ in range(rounds))
