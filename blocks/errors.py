"""How an engine refuses. Apart from the engine, so that passing it on does not take importing torch."""

from swarm.errors import InputError, SwarmError


class DoesNotFit(InputError):
    """A shard takes more memory than there is, or than it may take."""


class NoCapacity(SwarmError):
    """The tokens a session asks for do not fit now. `retry_after` is in seconds, None if waiting is vain."""

    def __init__(self, message: str, retry_after: float | None):
        super().__init__(message, "Try again later, use another server, or ask for fewer tokens.")
        self.retry_after = retry_after


class StepError(SwarmError):
    """A step that cannot be run as it was asked for; `code` is the wire's word for why."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
