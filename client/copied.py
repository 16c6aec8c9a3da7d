"""How much of what a hop holds its standby holds as well, as far as that can be known for sure. Pure.

The standby tells how far it is, and after which of the hop's steps the hop was like that. What the client
took back since then it cannot know of: so every position at which the hop was or will be rolled back is noted
here, with the newest step that the hop had been asked by then.
"""

from swarm.page_keys import PAGE_TOKENS

MAX_CUTS = 64
"""How many cuts are told apart; older ones are taken together for less."""


class Copied:
    """Of one hop and one standby. `total` counts the tokens that were copied, some of them again."""

    def __init__(self, number: int, length: int):
        """What the hop, asked step `number` last, holds from `length` on is not the sequence any more."""
        self.total = 0
        self._tokens = 0
        self._cuts = [(number, length)]

    @property
    def tokens(self) -> int:
        """Of the sequence's first tokens so many it holds, in whole pages: it may roll back to those."""
        return self._tokens - self._tokens % PAGE_TOKENS

    def cut(self, number: int, length: int) -> None:
        """The sequence is another from `length` on; `number` is that of the last step asked before."""
        self._tokens = min(self._tokens, length)
        while self._cuts and self._cuts[-1][1] >= length:
            self._cuts.pop()
        self._cuts.append((number, length))
        if len(self._cuts) > MAX_CUTS:
            self._cuts[:2] = [(self._cuts[1][0], self._cuts[0][1])]

    def told(self, number: int, tokens: int) -> None:
        """The standby holds `tokens` tokens of what the hop held once it had taken up step `number`."""
        self._cuts = [cut for cut in self._cuts if cut[0] >= number]
        right = min([tokens, *(length for _, length in self._cuts)])
        self.total += max(right - self._tokens, 0)
        self._tokens = right
