"""Comparing what a hop gave with what others make of the same inputs.

Owns which numbers are compared. Must not know who is asked, nor what becomes of who differs.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from swarm.client.replay import Opinion
from swarm.client.route import Hop
from swarm.client.sensitivity import CALM, Sensitivity
from swarm.client.testimony import Given, Testimony
from swarm.client.verdict import Distance, Form, allowance
from swarm.kernels.imprint import difference, differences
from swarm.net.vouchers import Voucher

Gaps: TypeAlias = Callable[[Tensor, Sequence[int]], Awaitable[list[float]]]
"""By how many standard deviations of the logits of hidden states [rows, hidden] tokens miss the likeliest."""


class Comparison:
    """Tells results that are further apart than those of honest peers. Tokens are judged by `gaps`."""

    def __init__(self, gaps: Gaps):
        self._gaps = gaps

    async def differ(self, audited: Testimony, opinion: Opinion, found: Sensitivity = CALM) -> bool:
        """Whether what a hop gave is too far from what others give, whose blocks are as sensitive as that."""
        distance = Distance()
        for given in audited.given:
            distance = distance.joined(await self._distance(given, opinion))
        forms = [_form(hop) for hop in (audited.hop, *opinion.hops)]
        allowed = allowance(forms, audited.opened.codec, audited.hop.span.size)
        return distance.exceeds(found.of(allowed))

    async def differs_by_voucher(
        self, voucher: Voucher, rows: Given, liar: Hop, opinion: Opinion, found: Sensitivity
    ) -> bool:
        """Whether the voucher for `rows` shows it, to whoever has nothing else."""
        if voucher.kind == "token_ids":
            distance = await self._distance(rows, opinion)
        else:
            kept = opinion.kept[voucher.first : voucher.until]
            distance = Distance.of([difference(voucher.imprint, kept, voucher.first)])
        forms = [_form(hop) for hop in (liar, *opinion.hops)]
        allowed = found.of(allowance(forms, voucher.codec, liar.span.size))
        return distance.exceeds(replace(allowed, row=allowed.mean))

    async def _distance(self, given: Given, opinion: Opinion) -> Distance:
        if given.kept is not None:
            return Distance.of(differences(given.kept, opinion.kept[given.first : given.until]))
        hidden = opinion.hidden[given.first : given.until]
        return Distance.of([], await self._gaps(hidden, given.ids))


def opinions_differ(one: Opinion, other: Opinion, found: Sensitivity) -> bool:
    """Whether two opinions on the same inputs are further apart than those of honest peers."""
    distance = Distance.of(differences(one.kept, other.kept))
    codec = one.testimonies[-1].opened.codec
    blocks = sum(hop.span.size for hop in one.hops)
    forms = [_form(hop) for hop in (*one.hops, *other.hops)]
    return distance.exceeds(found.of(allowance(forms, codec, blocks)))


def _form(hop: Hop) -> Form:
    return hop.announcement.dtype, hop.announcement.quantization
