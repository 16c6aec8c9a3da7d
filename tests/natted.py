"""A small internet on one machine: public hosts, and hosts behind routers that translate addresses.

Network namespaces joined by a bridge; routers masquerade with nftables and drop what nobody asked for. They
keep ports as they are, but for those that choose another one for each connection (symmetric NAT). Nothing has
a name in the system: it all ends with the processes that hold it. Root alone may, on Linux.
"""

import asyncio
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

CLONE_NEWNET = 0x40000000


class NotAllowed(Exception):
    """This machine lets us have no network namespaces, or does not translate addresses."""


class Internet:
    """`hosts` by their names. `internet` makes it."""

    def __init__(self, holders: dict[str, int], addresses: dict[str, str]):
        """`holders` are open descriptors of the network namespaces of hosts and routers."""
        self._holders = holders
        self.addresses = addresses

    def bytes_sent(self, hidden: str, to: str) -> int:
        """How many bytes the host `hidden` has sent straight to another, or to that one's router."""
        address = self.addresses.get(f"router of {to}", self.addresses[to])
        with self.at(f"router of {hidden}"):
            command = ["nft", "list", "chain", "ip", "wall", "count"]
            listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(rf"daddr {re.escape(address)} counter packets \d+ bytes (\d+)", listed)
        assert found is not None
        return int(found[1])

    def enter(self, host: str) -> list[str]:
        """What to put before a command that is to run at `host`."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._holders[host]}"]

    @contextmanager
    def at(self, host: str) -> Iterator[None]:
        """Be at `host`: what this thread starts is there for good. Not for tasks that take turns."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(self._holders[host])
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)


@contextmanager
def internet(
    public: Sequence[str], hidden: Sequence[str], symmetric: Collection[str] = ()
) -> Iterator[Internet]:
    """Hosts with addresses of the internet, and `hidden` ones, each behind a router of its own.

    The routers of those in `symmetric` choose another port for each connection.

    Raises:
        NotAllowed: there can be none on this machine.
    """
    if not all(map(shutil.which, ("ip", "nft", "unshare"))):
        raise NotAllowed("ip, nft or unshare is missing")
    with ExitStack() as stack:
        routers = {f"router of {name}": name for name in hidden}
        pids = {name: _holder(stack) for name in ("bridge", *public, *routers, *hidden)}
        try:
            addresses = _wire(pids, public, routers, symmetric)
        except subprocess.CalledProcessError as error:
            raise NotAllowed(error.stderr.decode().strip() or str(error)) from error
        holders = {}
        for name in (*public, *routers, *hidden):
            holders[name] = os.open(f"/proc/{pids[name]}/ns/net", os.O_RDONLY)
            stack.callback(os.close, holders[name])
        yield Internet(holders, addresses)


def _holder(stack: ExitStack) -> int:
    """A process that holds a new network namespace until `stack` ends."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    stack.callback(process.communicate)  # closes its input, which ends it
    assert process.stdout is not None
    if not process.stdout.readline():
        raise NotAllowed("no new network namespace")
    return process.pid


def _wire(
    pids: dict[str, int], public: Sequence[str], routers: dict[str, str], symmetric: Collection[str]
) -> dict[str, str]:
    """Join the namespaces; the addresses that hosts have."""

    def run(name: str, *commands: str) -> None:
        script = "set -e; " + "; ".join(commands)
        inside = ["nsenter", f"--net=/proc/{pids[name]}/ns/net", "sh", "-c", script]
        subprocess.run(inside, check=True, capture_output=True)

    run("bridge", "ip link add br0 type bridge", "ip link set br0 up")
    addresses = {}
    for number, name in enumerate((*public, *routers), 1):
        addresses[name] = f"5.{number}.0.1"
        run(
            "bridge",
            f"ip link add port{number} type veth peer name wan netns {pids[name]}",
            f"ip link set port{number} master br0 up",
        )
        run(name, "ip link set lo up", f"ip addr add {addresses[name]}/8 dev wan", "ip link set wan up")
    outer = tuple(addresses.values())
    for number, (router, name) in enumerate(routers.items(), 1):
        addresses[name] = f"10.{number}.0.2"
        run(
            router,
            f"ip link add lan type veth peer name home netns {pids[name]}",
            f"ip addr add 10.{number}.0.1/24 dev lan",
            "ip link set lan up",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "nft add table ip nat",
            "nft 'add chain ip nat out { type nat hook postrouting priority 100; }'",
            f"nft add rule ip nat out oifname wan masquerade{' random' * (name in symmetric)}",
            "nft add table ip wall",
            "nft 'add chain ip wall through { type filter hook forward priority 0; policy drop; }'",
            "nft add rule ip wall through ct state established,related accept",
            "nft add rule ip wall through iifname lan accept",
            "nft 'add chain ip wall in { type filter hook input priority 0; policy drop; }'",
            "nft add rule ip wall in iifname lan accept",
            "nft 'add chain ip wall count { type filter hook postrouting priority 0; }'",
            *(f"nft add rule ip wall count oifname wan ip daddr {one} counter" for one in outer),
        )
        run(
            name,
            "ip link set lo up",
            f"ip addr add {addresses[name]}/24 dev home",
            "ip link set home up",
            f"ip route add default via 10.{number}.0.1",
        )
    return addresses


async def started_at(net: Internet, host: str, *command: str) -> asyncio.subprocess.Process:
    """A process at `host`, its output in pipes. Several may be started at once."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*net.enter(host), *command, stdout=pipe, stderr=pipe)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
