"""How often strangers may ask for what costs something: so much at once, then so much a second. Pure."""

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

    def take(self, client: str, now: float, tokens: int = 1) -> float:
        """Take `tokens` of `client`: 0 if there were as many, else the seconds until there are."""
        left = self.left(client, now)
        wait = 0.0 if left >= tokens else (tokens - left) / self._rate
        self._buckets[client] = (left - tokens if wait == 0 else left, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait

    def left(self, client: str, now: float) -> float:
        """How many tokens `client` has."""
        left, at = self._buckets.get(client, (float(self._burst), now))
        return min(left + max(now - at, 0) * self._rate, self._burst)
