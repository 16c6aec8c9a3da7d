"""Files for this user alone (mode 0600), there as a whole or not at all. What they hold is not known here."""

import errno
import os
import stat
import tempfile
from pathlib import Path


def write_private(path: Path, data: bytes, *, keep_existing: bool = False) -> None:
    """Write a file, and its folder where there is none; in place of what was there, or only if nothing was.

    All of it is written under another name first, so that nobody ever sees half of it.

    Raises:
        FileExistsError: `keep_existing`, and there is something at `path`.
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    file, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
        if keep_existing:
            os.link(draft, path)
        else:
            os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def read_private(path: Path, max_bytes: int) -> tuple[bytes, bool]:
    """The file's first bytes, `max_bytes` at most, and whether other users may read or change it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        return file.read(max_bytes), bool(stat.S_IMODE(mode) & 0o077)
