"""How many rows of prefill an iteration may take, so that those who decode beside it hardly notice.

Learns from the iterations that ran how long so many rows take. Pure: told of times, reads no clock.
"""

from math import log2

STALL = 1.7
"""How much longer an iteration may take with prefill than without, while others decode."""

ALONE_SECONDS = 0.15
"""How long an iteration of prefill alone may take: who comes meanwhile waits as long at most."""

LEAST_ROWS, LEAST_ALONE, MOST_ROWS = 8, 64, 384
SLOWER, FASTER = 0.1, 0.4
"""The weight of the newest iteration, where it was slower than expected and where it was faster."""


class Pace:
    """Seconds of decode iterations by their rows, and what a row of prefill adds to them."""

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}
        self._row: float | None = None

    def learn(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """An iteration of these rows took `seconds`."""
        if not prefill_rows:
            bucket = _bucket(decode_rows)
            self._decode[bucket] = _blend(self._decode.get(bucket), seconds)
        else:  # even without decode the weights pass by once, as for one row
            added = max(seconds - (self.decode_seconds(max(decode_rows, 1)) or 0.0), 0.1 * seconds)
            self._row = _blend(self._row, added / prefill_rows)

    def decode_seconds(self, rows: int) -> float | None:
        """What an iteration of so many rows of decode takes, never less than fewer; None where none ran."""
        known = [seconds for bucket, seconds in self._decode.items() if bucket <= _bucket(rows)]
        return max(known, default=None)

    def decode_rows(self, seconds: float) -> int:
        """The most rows that an iteration of decode has which takes no longer, as far as such have run."""
        quick = [bucket for bucket in self._decode if (self.decode_seconds(2**bucket) or 0.0) <= seconds]
        return 2 ** (max(quick) + 1) - 1 if quick else 0

    def prefill_rows(self, decoding: int) -> int:
        """Rows of prefill for the next iteration, where `decoding` rows of decode come along each time."""
        least = LEAST_ROWS if decoding else LEAST_ALONE
        if self._row is None:
            return least
        seconds = (STALL - 1) * (self.decode_seconds(decoding) or 0.0) if decoding else ALONE_SECONDS
        return max(least, min(MOST_ROWS, int(seconds / self._row)))


def _bucket(rows: int) -> int:
    return int(log2(max(rows, 1)))


def _blend(before: float | None, now: float) -> float:
    if before is None:
        return now
    weight = SLOWER if now > before else FASTER
    return (1 - weight) * before + weight * now
