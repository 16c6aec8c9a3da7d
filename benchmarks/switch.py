"""A switch that puts distance between network namespaces: packets wait as if their way were long and narrow.

`python -m benchmarks.switch --peers 4 --rtt-ms 100 --mbit-s 100` makes the namespaces, each with a TUN device
at an address of its own, prints one JSON line with its process id and the file descriptors that hold them,
and carries packets until its standard input ends. Nothing has a name in the system: all is gone when this
process is. Linux alone has what it needs, and root alone may.

The model. Each peer has a line of its own into the middle, as fast in both directions. A packet waits for the
line of its sender, at most `LONGEST_QUEUE` (it is dropped if that is not enough), is half a round trip on
its way, and then shares the line of its receiver with what came from others. TCP's own segments stay
together up to 64 KiB, as network cards have it, so that Python keeps up with a gigabit; they count with the
headers that they would have on a wire, and arrive when their last byte does.
"""

import argparse
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field

LONGEST_QUEUE = 0.1
"""Seconds that a packet waits for its sender's line at most."""

AT_ONCE = 64
"""Packets taken from one peer before the others have their turn."""

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TUN_WITHOUT_INFORMATION, TUN_WITH_OFFLOAD_HEADER = 0x1001, 0x4000
CHECKSUMS_AND_TCP_SEGMENTS = 0x3

OFFLOAD = struct.Struct("<BBHHHH")
"""virtio's header before each packet: flags, kind, bytes of headers, bytes of a segment, checksum's place."""

TARGET = slice(OFFLOAD.size + 16, OFFLOAD.size + 20)
"""Where an IPv4 packet says for whom it is."""

MAX_PACKET = 65_536 + OFFLOAD.size


def address_of(number: int) -> str:
    """The address of the peer in namespace `number`."""
    return f"10.77.0.{number + 1}"


@dataclass
class Line:
    """One direction of a peer's line: when it is free again, in seconds of the monotonic clock."""

    bytes_per_s: float
    free_at: float = 0.0

    def enter(self, size: int, now: float) -> float | None:
        """When the last byte of a packet that comes now has left; None if the queue is too long."""
        begins = max(now, self.free_at)
        if begins - now > LONGEST_QUEUE:
            return None
        self.free_at = begins + size / self.bytes_per_s
        return self.free_at

    def leave(self, size: int, now: float) -> float:
        """When the last byte of a packet is out that came at its own pace and is whole now."""
        self.free_at = max(now, self.free_at + size / self.bytes_per_s)
        return self.free_at


@dataclass
class Port:
    """A peer's place at the switch."""

    tun: int
    up: Line
    down: Line


@dataclass(order=True)
class Flight:
    """A packet under way; `count` keeps those of one moment in their order."""

    due: float
    count: int
    target: Port = field(compare=False)
    packet: bytes = field(compare=False)
    is_on_last_line: bool = field(compare=False, default=False)


class Switch:
    """Carries packets between ports until told to stop."""

    def __init__(self, ports: dict[bytes, Port], one_way: float):
        """`ports` by their packed addresses; `one_way` in seconds."""
        self.dropped = 0
        self._ports = ports
        self._by_tun = {port.tun: port for port in ports.values()}
        self._one_way = one_way
        self._flights: list[Flight] = []
        self._counts = itertools.count()

    def run(self, lifeline: int) -> None:
        """Carry packets until `lifeline` has something to read, or its end."""
        while True:
            wait = max(0.0, self._flights[0].due - time.monotonic()) if self._flights else None
            readable = select.select([*self._by_tun, lifeline], [], [], wait)[0]
            if lifeline in readable:
                return
            for tun in readable:
                self._take(self._by_tun[tun])
            self._deliver()

    def _take(self, source: Port) -> None:
        for _ in range(AT_ONCE):
            try:
                packet = os.read(source.tun, MAX_PACKET)
            except BlockingIOError:
                return
            target = self._ports.get(packet[TARGET])
            if target is None:
                continue
            now = time.monotonic()
            left = source.up.enter(wire_bytes(packet), now)
            if left is None:
                self.dropped += 1
                continue
            heapq.heappush(self._flights, Flight(left + self._one_way, next(self._counts), target, packet))

    def _deliver(self) -> None:
        flights = self._flights
        while flights and flights[0].due <= time.monotonic():
            flight = heapq.heappop(flights)
            if not flight.is_on_last_line:
                flight.is_on_last_line = True
                arrived, flight.due = (
                    flight.due,
                    flight.target.down.leave(wire_bytes(flight.packet), flight.due),
                )
                if flight.due > arrived:
                    heapq.heappush(flights, flight)
                    continue
            try:
                os.write(flight.target.tun, flight.packet)
            except BlockingIOError:
                self.dropped += 1


def wire_bytes(packet: bytes) -> int:
    """Bytes that a packet with its offload header would take on a wire, cut into its segments."""
    _, kind, header, segment, _, _ = OFFLOAD.unpack_from(packet)
    size = len(packet) - OFFLOAD.size
    if not kind or not segment:
        return size
    segments = -(-(size - header) // segment)
    return size + (segments - 1) * header


def new_namespace(number: int, bytes_per_s: float) -> tuple[int, Port]:
    """Go into a new network namespace with a device at `address_of(number)`; a descriptor that holds it.

    Raises:
        OSError, CalledProcessError: this machine does not allow it, or `ip` is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no new network namespace")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = TUN_WITHOUT_INFORMATION | TUN_WITH_OFFLOAD_HEADER
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"distance", flags))
    fcntl.ioctl(tun, TUNSETOFFLOAD, CHECKSUMS_AND_TCP_SEGMENTS)
    for command in (
        "link set lo up",
        f"address add {address_of(number)}/24 dev distance",
        "link set distance up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), Port(tun, Line(bytes_per_s), Line(bytes_per_s))


def go_first() -> None:
    """Be scheduled before everything that computes, where that is allowed: this process needs little."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        print("the switch is not scheduled first: its delays may be longer than asked", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--rtt-ms", type=float, required=True, help="between any two peers")
    parser.add_argument("--mbit-s", type=float, required=True, help="of each peer's line, each way")
    args = parser.parse_args()
    places = [new_namespace(number, args.mbit_s * 1e6 / 8) for number in range(args.peers)]
    ports = {bytes(map(int, address_of(number).split("."))): port for number, (_, port) in enumerate(places)}
    switch = Switch(ports, args.rtt_ms / 2000)
    go_first()
    namespaces = [namespace for namespace, _ in places]
    print(json.dumps({"pid": os.getpid(), "namespaces": namespaces}), flush=True)
    switch.run(sys.stdin.fileno())
    print(json.dumps({"dropped": switch.dropped}), flush=True)


if __name__ == "__main__":
    main()
