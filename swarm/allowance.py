"""How often strangers may ask for what costs something: so many at once, then so many a second. Pure."""

from collections import OrderedDict

MAX_CLIENTS = 4_096


class Allowance:
    """A bucket of `burst` tokens for each client, filled with `rate` tokens a second.

    Source: the token bucket of RFC 2697, section 3, with one colour.
    """

    def __init__(self, rate: float, burst: int):
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """Take a token of `client`: 0 if there was one, else the seconds until there is."""
        left, at = self._buckets.pop(client, (float(self._burst), now))
        left = min(left + max(now - at, 0) * self._rate, self._burst)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._buckets[client] = (left - 1 if wait == 0 else left, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait
