"""A session's stream to one hop: its opening, requests that are answered at once, and hearing the rest.

Owns the stream and the task that listens to it. What steps and their answers mean is the leg's business.
"""

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from swarm.client.faults import Gone, HopError, RemoteFault, blaming, refusal
from swarm.client.route import Hop
from swarm.errors import SwarmError
from swarm.net.calls import MessageStream
from swarm.net.messages import (
    AnyMessage,
    Close,
    Closed,
    Error,
    HandedOver,
    Linked,
    Mirrored,
    Open,
    Opened,
    Ping,
    Pong,
    Step,
)
from swarm.net.transport import StreamClosed, Transport


@dataclass(frozen=True)
class Deadlines:
    """Seconds granted to a hop: for its answer to `Open`, to a step (and more for each token), to `Close`.

    A hop that says it is at work has those of `step`; one that says nothing is given up much sooner.
    """

    open: float = 15.0
    step: float = 30.0
    step_token: float = 0.1
    close: float = 1.0
    ping: float = 3.0
    link: float = 15.0
    hand_over: float = 30.0

    def for_step(self, tokens: int) -> float:
        return self.step + self.step_token * tokens


class HopStream:
    """The stream to `hop`. Answers to steps and what comes unasked go to `on_message`, its end `on_end`."""

    def __init__(
        self,
        hop: Hop,
        deadlines: Deadlines,
        on_message: Callable[[AnyMessage, memoryview], None],
        on_end: Callable[[Exception], None],
    ):
        self._hop = hop
        self._deadlines = deadlines
        self._on_message = on_message
        self._on_end = on_end
        self._calls: MessageStream | None = None
        self._listening: asyncio.Task[None] | None = None
        self._heard = 0
        self._pongs: dict[int, asyncio.Future[Pong]] = {}
        self._answer: asyncio.Future[AnyMessage] | None = None
        self._asking = asyncio.Lock()

    async def open(self, transport: Transport, asked: Open) -> Opened:
        """
        Raises:
            RemoteFault, NoCapacity, RequestRefused: see `swarm.client.faults`.
        """
        with blaming(self._hop):
            stream = await transport.open_stream(self._hop.peer, self._hop.announcement.addresses)
            self._calls = MessageStream(stream)
            answer, _ = await self._calls.call(asked, timeout=self._deadlines.open)
        if not isinstance(answer, Opened):
            raise RemoteFault(self._hop, "answered the opening of a session with something else")
        return answer

    def listen(self, max_body: int) -> None:
        """Hear what the hop says from now on, in the background."""
        self._listening = asyncio.create_task(self._listen(max_body), name=f"listen to {self._hop.peer}")

    async def send(self, step: Step, body: bytes | memoryview) -> None:
        """
        Raises:
            RemoteFault: it takes nothing any more, or is gone.
        """
        assert self._calls is not None
        if self._calls.offer(step, body):
            return
        try:
            with blaming(self._hop):
                async with asyncio.timeout(self._deadlines.for_step(step.shape[0])):
                    await self._calls.send(step, body)
        except TimeoutError:
            raise Gone(self._hop, "takes nothing any more") from None

    async def ping(self) -> int | None:
        """The number of the newest step that the hop has taken up; None if it says other things first.

        Raises:
            RemoteFault: it does not answer even this, nor says anything else meanwhile.
        """
        assert self._calls is not None
        nonce, heard = secrets.randbelow(2**31), self._heard
        self._pongs[nonce] = asyncio.get_running_loop().create_future()
        try:
            with blaming(self._hop):
                async with asyncio.timeout(self._deadlines.ping):
                    await self._calls.send(Ping(nonce=nonce))
                    return (await self._pongs[nonce]).taken
        except TimeoutError:
            if self._heard == heard:
                raise Gone(self._hop, "does not answer any more") from None
            return None
        finally:
            del self._pongs[nonce]

    async def ask(self, asked: AnyMessage, kind: type[AnyMessage], timeout: float) -> AnyMessage:
        """A request that is no step. One at a time, since an error does not say which it answers.

        Raises:
            HopError: it was refused, or not answered by a `kind` within `timeout` seconds.
        """
        assert self._calls is not None
        async with self._asking:
            self._answer = asyncio.get_running_loop().create_future()
            try:
                with blaming(self._hop):
                    async with asyncio.timeout(timeout):
                        await self._calls.send(asked)
                        answer = await self._answer
            except TimeoutError:
                raise Gone(self._hop, "did not answer in time") from None
            finally:
                self._answer = None
        if isinstance(answer, Error):
            raise refusal(self._hop, answer)
        if not isinstance(answer, kind):
            raise RemoteFault(self._hop, "answered something that it was not asked")
        return answer

    async def close(self, session_id: str) -> Closed | None:
        """Say goodbye, so that the hop frees its memory at once; it will anyway when the stream ends.

        Returns what it answers, None if nothing.
        """
        try:
            if self._calls is not None and self._listening is not None:
                with suppress(SwarmError):
                    answer = await self.ask(Close(session_id=session_id), Closed, self._deadlines.close)
                    return answer if isinstance(answer, Closed) else None
        finally:
            self.abort()
        return None

    def abort(self) -> None:
        """End the stream at once. Safe to call again."""
        if self._listening is not None:
            self._listening.cancel()
        if self._calls is not None:
            self._calls.close()
        self._end_waiting()

    async def _listen(self, max_body: int) -> None:
        assert self._calls is not None
        try:
            with blaming(self._hop):
                await self._calls.receive(max_body, self._takes)
        except HopError as fault:
            self._end_waiting()
            self._on_end(fault)
        except Exception as bug:  # nobody awaits this task: whoever waits for the hop must hear of it
            self._on_end(bug)

    def _takes(self, message: AnyMessage, body: memoryview) -> bool:
        """Hear it, whatever it is."""
        self._heard += 1
        match message:
            case Pong():
                if (pong := self._pongs.get(message.nonce)) is not None and not pong.done():
                    pong.set_result(message)
            case Linked() | HandedOver() | Mirrored() | Closed() | Error(number=None):
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case _:
                self._on_message(message, body)
        return True

    def _end_waiting(self) -> None:
        for future in (self._answer, *self._pongs.values()):
            if future is not None and not future.done():
                future.set_exception(StreamClosed("The stream has ended."))
                future.exception()  # whoever waits for it may be gone too
