"""A search of the DHT: for some keys at once, the nodes nearest to each, and what they keep under it.

Built to bear liars. Only who has answered counts as near, so that nodes which do not exist hide nobody. What
one node names takes up a few places at a time, and none once several of it did not answer. Of one network,
which may be one person's, few count, so that the search goes on past a crowd that stands around a key. And
whatever anybody on the way keeps is heard. How nodes are called is not known here.

Sources: Maymounkov and Mazières, "Kademlia" (2002); for what liars do Baumgart and Mies, "S/Kademlia" (2007).
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from swarm.dht.neighbours import PER_NETWORK, Node, spread

BEAM = 10
"""How many of the nearest nodes have to have answered, of whom few are of one network."""

MAX_ASKED = 30
"""Nodes that count, asked for one key at most: a swarm in a single network has no others to go on to."""

MAX_CROWD = 60
"""Nodes that are asked besides where so many belong to crowds: these are to keep nobody from being asked."""

NAMED_AT_ONCE = 4
"""Nodes named by the same one that are asked, or about to be, at a time."""

MOST_FAILED = 4
"""So many that did not answer, and who named them is not believed any more."""

KEYS_PER_CALL = 16
CALLS_AT_ONCE = 32

P = TypeVar("P")


class Answer(NamedTuple, Generic[P]):
    """What a node says for one key: the values it keeps there, and nodes nearer to it."""

    values: Sequence[bytes]
    named: Sequence[Node[P]]


class Answers(NamedTuple, Generic[P]):
    """All that a node said, by key, and the network that it was reached in."""

    network: str
    by_key: Mapping[int, Answer[P]]


Ask: TypeAlias = Callable[[P, Sequence[int]], Awaitable[Answers[P] | None]]
"""Ask one node for some keys; None if it does not answer."""


@dataclass
class _Candidate(Generic[P]):
    node: Node[P]
    namers: list[int] = field(default_factory=list)
    """The ids of the nodes that named it; none if it was known before."""


@dataclass
class Found(Generic[P]):
    """One key's search: what is known of the nodes around it. Decides whom to ask next."""

    key: int
    values: list[bytes] = field(default_factory=list)
    _candidates: dict[int, _Candidate[P]] = field(default_factory=dict)
    _asked: set[int] = field(default_factory=set)
    _networks: dict[int, str] = field(default_factory=dict)
    _failed: set[int] = field(default_factory=set)
    _failures: Counter[int] = field(default_factory=Counter)

    @property
    def is_unanswered(self) -> bool:
        """Whether some were asked, and none of them answered."""
        return bool(self._asked) and not self._networks

    def holders(self, *others: Node[P]) -> list[Node[P]]:
        """The nodes that have answered, and `others`: the nearest first, of several networks if it can be."""
        near = [self._candidates[one].node._replace(network=of) for one, of in self._networks.items()]
        near = sorted((*near, *others), key=lambda node: node.node_id ^ self.key)
        return spread(near, len(near))

    def hear_of(self, nodes: Iterable[Node[P]], namer: int | None = None) -> None:
        for node in nodes:
            known = self._candidates.get(node.node_id)
            if known is None:
                namers = [] if namer is None else [namer]
                self._candidates[node.node_id] = _Candidate(node, namers)
            elif known.namers and namer is not None:
                known.namers.append(namer)

    def on_answer(self, node_id: int, network: str, answer: Answer[P]) -> None:
        """What comes from a crowd is heard, and does not lead further into it."""
        self._networks[node_id] = network
        self.values += answer.values
        if not self._is_in_a_crowd(node_id):
            self.hear_of(answer.named, node_id)

    def on_silence(self, node_id: int) -> None:
        self._failed.add(node_id)
        self._failures.update(self._candidates[node_id].namers)

    def ask_next(self) -> list[Node[P]]:
        """Whom to ask now, each once."""
        chosen = []
        for node in self._wanted()[: MAX_ASKED + self._in_crowds() - len(self._asked)]:
            self._asked.add(node.node_id)
            chosen.append(node)
        return chosen

    def _wanted(self) -> list[Node[P]]:
        """The nodes to ask of the `BEAM` nearest that count."""
        near, wanted = 0, []
        networks: Counter[str] = Counter()
        named: Counter[int] = Counter()
        for node_id in self._by_distance():
            candidate = self._candidates[node_id]
            if node_id in self._networks:
                networks[self._networks[node_id]] += 1
                near += networks[self._networks[node_id]] <= PER_NETWORK
            elif not self._is_believed(candidate, named):
                continue
            else:
                near += 1
                if node_id not in self._asked:
                    wanted.append(candidate.node)
            if near == BEAM:
                break
        return wanted

    def _is_believed(self, candidate: _Candidate[P], named: Counter[int]) -> bool:
        if not candidate.namers:
            return True
        for namer in candidate.namers:
            if self._failures[namer] < MOST_FAILED and named[namer] < NAMED_AT_ONCE:
                named[namer] += 1
                return True
        return candidate.node.node_id in self._asked

    def _by_distance(self) -> list[int]:
        return sorted(self._candidates.keys() - self._failed, key=lambda node_id: node_id ^ self.key)

    def _in_crowds(self) -> int:
        """How many have answered that do not count, `MAX_CROWD` at most."""
        answered = Counter(self._networks.values())
        if len(answered) < 2:
            return 0
        return min(MAX_CROWD, sum(max(0, count - PER_NETWORK) for count in answered.values()))

    def _is_in_a_crowd(self, node_id: int) -> bool:
        """Whether enough nodes of its network have answered that are nearer."""
        network, distance = self._networks[node_id], node_id ^ self.key
        alike = (one for one, of in self._networks.items() if of == network and one ^ self.key < distance)
        return sum(1 for _ in alike) >= PER_NETWORK and len(set(self._networks.values())) > 1


async def search(
    keys: Iterable[int], start: Callable[[int], Iterable[Node[P]]], ask: Ask[P]
) -> dict[int, Found[P]]:
    """Search for all of `keys`, beginning for each at the nodes that `start` gives."""
    found: dict[int, Found[P]] = {key: Found(key) for key in keys}
    for one in found.values():
        one.hear_of(start(one.key))
    turn = asyncio.Semaphore(CALLS_AT_ONCE)

    async def asked(node: Node[P], some: Sequence[int]) -> tuple[int, Sequence[int], Answers[P] | None]:
        async with turn:
            return node.node_id, some, await ask(node.peer, some)

    calls = {asyncio.create_task(asked(node, some)) for node, some in _calls(found, found)}
    try:
        while calls:
            done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            concerned: dict[int, None] = {}
            for node_id, some, answers in (call.result() for call in done):
                concerned |= dict.fromkeys(some)
                for key in some:
                    _hear(found[key], node_id, answers)
            calls |= {asyncio.create_task(asked(node, some)) for node, some in _calls(found, concerned)}
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    return found


def _hear(one: Found[P], node_id: int, answers: Answers[P] | None) -> None:
    answer = answers.by_key.get(one.key) if answers else None
    if answers is None or answer is None:
        one.on_silence(node_id)
    else:
        one.on_answer(node_id, answers.network, answer)


def _calls(found: Mapping[int, Found[P]], keys: Iterable[int]) -> list[tuple[Node[P], Sequence[int]]]:
    """Whom to ask next for which of `keys`, in as few calls as these fit into."""
    wanted: defaultdict[int, list[int]] = defaultdict(list)
    nodes: dict[int, Node[P]] = {}
    for key in keys:
        for node in found[key].ask_next():
            wanted[node.node_id].append(key)
            nodes[node.node_id] = node
    return [
        (nodes[node_id], some[first : first + KEYS_PER_CALL])
        for node_id, some in wanted.items()
        for first in range(0, len(some), KEYS_PER_CALL)
    ]
