"""What is found by connecting to a TCP port: whether a peer is there, something else, or nothing.

A libp2p peer greets who connects, before it is told anything: so nothing is ever sent. Knows neither
daemons nor peer ids.
"""

import asyncio
import errno
import socket
from contextlib import suppress
from typing import Literal, TypeAlias

GREETING = b"\x13/multistream/1.0.0\n"
"""What both sides of a connection begin with. Source: multistream-select 1.0."""

Dialled: TypeAlias = Literal["greeted", "not_a_peer", "refused", "silent", "no_way"]
"""A peer greeted; something else is there, or says nothing; nobody listens; no answer; no way leads there."""

FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
"""Of which kind the IP addresses are that the names in multiaddrs lead to."""

_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def dial(host: str, port: int, timeout: float) -> Dialled:
    """Connect to an IP address, hear who is there, and leave, all within `timeout` seconds."""
    is_connected = False
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            is_connected = True
            heard = await reader.readexactly(len(GREETING))
        return "greeted" if heard == GREETING else "not_a_peer"
    except TimeoutError:
        return "not_a_peer" if is_connected else "silent"
    except asyncio.IncompleteReadError:
        return "not_a_peer"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        if is_connected:
            return "not_a_peer"
        return "no_way" if error.errno in _NO_WAY else "silent"
    finally:
        if writer is not None:
            writer.transport.abort()


async def resolve(host: str, family: socket.AddressFamily, timeout: float) -> list[str]:
    """The IP addresses of a name; none where it has none, or nobody says within `timeout` seconds."""
    loop = asyncio.get_running_loop()
    with suppress(OSError, UnicodeError, TimeoutError):
        async with asyncio.timeout(timeout):
            found = await loop.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))
    return []
