"""Errors that a person reads: one sentence on what is wrong, one hint on what to do.

Every room raises these for what its caller can answer. A command prints `message` and `hint`
and ends with `exit_code`; anything else that reaches a command's end is a bug.
"""


class SwarmError(Exception):
    """Something went wrong that is not the user's mistake: a lost peer, a full server, a dead daemon."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InputError(SwarmError):
    """What the user gave cannot be used: a flag, a path, a file, an address."""

    exit_code = 2


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, as the end of a sentence that already names the file."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    return (isinstance(error, OSError) and error.strerror) or str(error)
