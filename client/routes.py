"""The routes of one client: finding one, waiting for it, waking who sleeps on it, moving to a better one.

The fastest route itself is found in `route`, what is announced is the directory's, what this client has
learned of peers stands in `experience`. Must not know of sessions or of what travels along a route.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, TypeVar

from swarm.client.concurrently import concurrently
from swarm.client.costs import ONE_TOKEN, Costs, Demand
from swarm.client.estimate import estimate
from swarm.client.experience import Experience
from swarm.client.faults import HopError, NoCapacity, RemoteFault, RequestRefused
from swarm.client.graph import View
from swarm.client.lots import lot
from swarm.client.privacy import NO_PRIVACY, Limits, Privacy
from swarm.client.route import Hop, NoRoute, Route, blocks_text, find_route
from swarm.client.waking import wake
from swarm.client.witnesses import choose_witness
from swarm.dht.announcement import Announcement
from swarm.dht.directory import Directory
from swarm.dht.rtts import MAX_PEERS
from swarm.errors import SwarmError
from swarm.net.transport import PeerId, Transport, TransportError
from swarm.spans import Span

T = TypeVar("T")

CLEARLY = 0.25
"""The part of a token's time that another route must save for a session to move there.

It lies above what measuring distances varies by, so that routes of about the same speed keep their sessions.
"""

FLOAT32_BYTES = 4

ROUTE_PAUSE = 1.0
"""Seconds between two looks at why there is no route yet."""

WAKING_PATIENCE = 15.0
"""Seconds that a peer which sleeps has to answer."""

HURRY_PERIOD = 2.0
"""Seconds after which the directory may be asked to look for newcomers once more, who may be standbys."""

RTT_PATIENCE = 1.5
"""Seconds that a new client waits at most for the round trips to its servers to be measured."""

OnWaiting: TypeAlias = Callable[[SwarmError], None]
"""Called with the reason each time that a route has to be waited for."""

Find: TypeAlias = Callable[[], Route]


class ServedModel(Protocol):
    """What must be known of a model here; `swarm.blocks.models.Model` has it."""

    @property
    def name(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...


class Routes:
    """The routes through one model. `timeout` is how many seconds one is waited for."""

    def __init__(
        self,
        directory: Directory,
        transport: Transport,
        model: ServedModel,
        *,
        timeout: float,
        privacy: Privacy = NO_PRIVACY,
        on_waiting: OnWaiting = lambda reason: None,
    ):
        """
        Raises:
            InputError: with such `privacy` no peer may run anything of this model.
        """
        self.timeout = timeout
        self.failure: TransportError | None = None
        """Why this client's own network has failed; None while it has not."""
        self._directory = directory
        self._transport = transport
        self._model = model
        self._limits = privacy.limits(model.num_blocks)
        self._on_waiting = on_waiting
        self._experience = Experience()
        self._hurried_at = -HURRY_PERIOD
        self._viewed: list[Announcement] = []
        self._view = View.of(self._viewed)

    def find(self, tokens: int = 1, demand: Demand = ONE_TOKEN, span: Span | None = None) -> Route:
        """The fastest route now for a session of `tokens` tokens that is going to ask for `demand`.

        It leads through all blocks, or those of `span`; through suspects only where there is nobody else.

        Raises:
            NoRoute: some blocks have no server with room.
        """
        return self._find(span or self._whole, tokens, demand, self.costs(), self._limits)

    async def wait(self, tokens: int = 1, demand: Demand = ONE_TOKEN) -> Route:
        """`find`, waited for up to `timeout` seconds.

        Raises:
            NoRoute: none came up.
        """

        def find() -> Route:
            return self.find(tokens, demand)

        await self._until_found(find, self.timeout)
        await self._directory.wait_for(self._knows_distances, RTT_PATIENCE)
        return find()

    async def detour(
        self,
        span: Span,
        tokens: int,
        *,
        like: Announcement,
        timeout: float,
        beside: Iterable[Hop] = (),
        demand: Demand = ONE_TOKEN,
    ) -> tuple[Hop, ...]:
        """The fastest hops through the blocks of `span` alone, waited for up to `timeout` seconds.

        They compute in the dtype and quantization of `like` if such are to be had that have not failed. A
        suspect that is the only one is given a rest, the longer the more often it has failed. The session's
        other blocks are run by the hops `beside`.

        Raises:
            NoRoute: none came up.
        """

        limits = self._limits.beside((hop.peer, hop.span) for hop in beside)

        def find() -> Route:
            return self._find(span, tokens, demand, self.costs(like), limits)

        return (await self._until_found(find, timeout)).hops

    def standby_for(
        self, hop: Hop, tokens: int, *, beside: Iterable[Hop], left_out: Iterable[PeerId]
    ) -> Hop | None:
        """The fastest other hop that can go on with what `hop` holds, as it is; None if there is none now.

        None of the peers `left_out`, and no suspect: who is gone stays announced for a while. The session's
        other blocks are run, or stood by for, by the hops `beside`. Where there is none, the directory looks
        for newcomers soon.
        """
        limits = self._limits.beside((other.peer, other.span) for other in beside)
        alike, costs = _form(hop.announcement), self.costs()
        asked = dict.fromkeys(costs.penalties, "has failed")
        asked |= dict.fromkeys([hop.peer, *left_out], "has been asked")
        for one in self._directory.announcements:
            if _form(one) != alike or not one.span.covers(hop.span):
                asked[one.peer_id] = "cannot hold what that hop holds"
        try:
            hops = self._find(hop.span, tokens, ONE_TOKEN, costs, limits, asked).hops
        except NoRoute:
            if self._now() >= self._hurried_at + HURRY_PERIOD:
                self._hurried_at = self._now()
                self._directory.hurry()
            return None
        return hops[0] if len(hops) == 1 else None

    def better(self, route: Route, demand: Demand) -> Route | None:
        """Another route that a session on `route` is clearly better off on, None if there is none.

        Both are judged by what is announced and known now, others' waiting included. A token must take
        `CLEARLY` less, and all of `demand.new_tokens` must save more than it costs to move: to open the
        session there and to run the `demand.prompt_tokens` that it holds once more.
        """
        present = self._as_announced(route)
        if present is None:
            return None
        costs = self.costs()
        try:
            tokens = demand.prompt_tokens + demand.new_tokens
            other = self._find(self._whole, tokens, demand, costs, self._limits)
        except NoRoute:
            return None
        here, there = estimate(present, costs, demand), estimate(other.visits, costs, demand)
        saved = (here.cost - there.cost) * demand.new_tokens
        is_clear = there.cost <= here.cost * (1 - CLEARLY)
        return other if is_clear and saved > there.first_token + there.token else None

    def demand(self, prompt_tokens: int, new_tokens: int, rows: int = 1) -> Demand:
        """What a session of this model asks of a route, its activations in float32."""
        return Demand(prompt_tokens, new_tokens, self._model.hidden_size * FLOAT32_BYTES, rows)

    def costs(self, like: Announcement | None = None) -> Costs:
        """What this client has learned of peers; those that compute otherwise than `like` cost more."""
        announcements = self._directory.announcements
        others = [] if like is None else [one.peer_id for one in announcements if _form(one) != _form(like)]
        missing = [one.peer_id for one in announcements if self._directory.is_missing(one.peer_id)]
        costs = self._experience.costs(self._directory.rtt, self._now(), others=others, missing=missing)
        return replace(costs, lot=partial(lot, self._transport.peer))

    def may_push(self, source: PeerId, target: PeerId) -> bool:
        """Whether `source` is to be asked to send straight to `target`."""
        return self._experience.may_push(source, target, self._now())

    def caught(self, peer: PeerId) -> None:
        """`peer` has given wrong results: it is left out of routes for a day."""
        self._experience.caught(peer, self._now())

    def witnesses(
        self,
        span: Span,
        tokens: int,
        *,
        known: Collection[PeerId],
        beside: Iterable[Hop],
        rng: random.Random,
    ) -> tuple[Hop, ...]:
        """Hops that run `span` once more for a second opinion, none of them of the peers `known`.

        One by lot where somebody holds all of it, else the fastest ones; suspects only where there is nobody
        else. The session's other blocks are run by the hops `beside`.

        Raises:
            NoRoute: nobody else can be asked now.
        """
        now, limits = self._now(), self._limits.beside((hop.peer, hop.span) for hop in beside)
        announcements = self._directory.announcements
        costs = self.costs()
        left_out = {*known, *self._experience.avoided(announcements, now), *costs.penalties}
        candidates = [
            server
            for server in limits.within(announcements)
            if server.state == "serving"
            and server.kv_tokens_left >= tokens
            and server.span.covers(span)
            and limits.left(server.peer_id) >= span.size
            and server.peer_id not in left_out
        ]
        accused = [server for server in announcements if server.peer_id in known]
        witness = choose_witness(candidates, accused, rng)
        if witness is not None:
            return (Hop(witness.peer_id, span, witness),)
        asked = dict.fromkeys(known, "has been asked")
        return self._find(span, tokens, ONE_TOKEN, costs, limits, asked).hops

    def doubt(self, hop: Hop) -> None:
        """Something may be wrong with what `hop` gives, or with what another one does."""
        self._experience.doubted(hop.peer, self._now())

    def push_failed(self, source: PeerId, target: PeerId) -> None:
        """`source` could not reach `target`: for some minutes that edge leads through the client."""
        self._experience.push_failed(source, target, self._now())

    def succeeded(self, hop: Hop, tokens: int, queue_ms: float, compute_ms: float) -> None:
        """`hop` ran a step of `tokens` tokens: it is forgiven a little, and its times are remembered."""
        self._experience.succeeded(hop, tokens, queue_ms / 1000, compute_ms / 1000, self._now())

    def judge(self, fault: HopError) -> None:
        """Hear of a hop that failed: faults are held against it, lack of room makes routes avoid it.

        Raises:
            TransportError: it was not the peer's fault: this client's own network has failed.
        """
        self._judge(fault, was_open=True)

    def judge_opening(self, fault: HopError) -> None:
        """`judge`, where a stream that ends at once is no idle session's."""
        self._judge(fault, was_open=False)

    async def until_routed(
        self,
        attempt: Callable[[], Awaitable[T]],
        tokens: int,
        timeout: float | None = None,
        *,
        span: Span | None = None,
    ) -> T:
        """Repeat `attempt`, which needs a route as `find` gives, until it succeeds or the time is up.

        It is up after `timeout` seconds, the ones this was made with if none are given. Meanwhile other
        peers are asked, and woken where they sleep. Where there are only suspects, each is given a rest, the
        longer the more often it has failed.

        Raises:
            NoRoute, RemoteFault, NoCapacity: as the last attempt.
            RequestRefused: nobody else could be asked.
        """

        def find() -> Route:
            return self.find(tokens, span=span)

        deadline = self._now() + (self.timeout if timeout is None else timeout)
        while True:
            try:
                return await attempt()
            except RequestRefused:
                if _found(find) is None or self._now() >= deadline:
                    raise
                continue
            except (NoRoute, RemoteFault, NoCapacity) as error:
                if self._now() >= deadline:
                    raise
                reason = error
            if isinstance(reason, NoRoute):
                await self._wait_for_route(reason, find, deadline)
            else:
                await self._let_rest(find, deadline)

    async def _until_found(self, find: Find, timeout: float) -> Route:
        """`find`, again and again for up to `timeout` seconds; through who rests only once that is over.

        Raises:
            NoRoute: none came up.
        """
        deadline = self._now() + timeout
        while True:
            try:
                route = find()
            except NoRoute as reason:
                if self._now() >= deadline:
                    raise
                await self._wait_for_route(reason, find, deadline)
                continue
            if self._is_rested(route) or self._now() >= deadline:
                return route
            await self._let_rest(find, deadline)

    async def _wait_for_route(self, reason: NoRoute, find: Find, deadline: float) -> None:
        """Wait a moment, not beyond `deadline`, for a route that there is not for `reason`."""
        if reason.to_wake:
            self._on_waiting(reason)
            timeout = min(WAKING_PATIENCE, deadline - self._now())
            await concurrently(*(self._wake(server, timeout) for server in reason.to_wake))
        pause = min(ROUTE_PAUSE, deadline - self._now())
        is_found = await self._directory.wait_for(lambda: _found(find) is not None, pause)
        if not is_found and not reason.to_wake:
            self._on_waiting(reason)

    async def _let_rest(self, find: Find, deadline: float) -> None:
        """Wait, not beyond `deadline`, while the best route leads through a peer that rests."""
        route = _found(find)
        if route is None or self._is_rested(route):
            return
        self._on_waiting(self._why_it_rests(route))
        until = self._experience.rest_until(hop.peer for hop in route.hops)

        def is_rested() -> bool:
            better = _found(find)
            return better is not None and self._is_rested(better)

        await self._directory.wait_for(is_rested, max(0.0, min(until, deadline) - self._now()))

    def _is_rested(self, route: Route) -> bool:
        return self._experience.rest_until(hop.peer for hop in route.hops) <= self._now()

    def _why_it_rests(self, route: Route) -> SwarmError:
        now = self._now()
        resting = [hop for hop in route.hops if self._experience.rest_until([hop.peer]) > now]
        blocks = ", ".join(blocks_text(hop.span) for hop in resting)
        return SwarmError(f"All servers of {blocks} of {self._model.name} have failed just now.")

    async def _wake(self, server: Announcement, timeout: float) -> None:
        try:
            await wake(self._transport, server, timeout)
        except HopError as answer:
            self.judge_opening(answer)

    @property
    def _whole(self) -> Span:
        return Span(0, self._model.num_blocks)

    def _find(
        self,
        span: Span,
        tokens: int,
        demand: Demand,
        costs: Costs,
        limits: Limits,
        left_out: Mapping[PeerId, str] = MappingProxyType({}),
    ) -> Route:
        announcements = self._directory.announcements
        if announcements != self._viewed:
            self._viewed, self._view = announcements, View.of(announcements)
        avoided = self._experience.avoided(announcements, self._now())
        return find_route(
            self._view,
            span,
            costs=costs,
            demand=demand,
            model=self._model.name,
            tokens=tokens,
            excluded={peer: one.reason for peer, one in avoided.items()} | dict(left_out),
            woken=[peer for peer, one in avoided.items() if one.said is not None],
            limits=limits,
        )

    def _as_announced(self, route: Route) -> list[tuple[Announcement, Span]] | None:
        """The hops of `route` by what their peers announce now; None if one does not serve its span."""
        serving = {one.peer_id: one for one in self._directory.announcements if one.state == "serving"}
        said = [(serving.get(hop.peer), hop.span) for hop in route.hops]
        present = [(one, span) for one, span in said if one is not None and one.span.covers(span)]
        return present if len(present) == len(said) else None

    def _knows_distances(self) -> bool:
        """Whether the servers were pinged, or as many of them as ever are."""
        peers = {server.peer_id for server in self._directory.announcements if server.state == "serving"}
        pinged = sum(map(self._was_pinged, peers))
        return pinged >= min(len(peers), MAX_PEERS)

    def _was_pinged(self, peer: PeerId) -> bool:
        return self._directory.rtt(peer) is not None or self._directory.is_missing(peer)

    def _judge(self, fault: HopError, *, was_open: bool) -> None:
        if self.failure is not None:
            raise self.failure
        self._experience.failed(fault, self._now(), was_open=was_open)
        if isinstance(fault, RemoteFault):
            self._directory.hurry()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _found(find: Find) -> Route | None:
    try:
        return find()
    except NoRoute:
        return None


def _form(server: Announcement) -> tuple[str, str]:
    return server.dtype, server.quantization
