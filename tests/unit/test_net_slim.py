"""The network without torch, and hivemind as whole as ever for who asks for the rest of it."""

import subprocess
import sys

CODE = """
import sys
import swarm.dht.kademlia
assert not {"torch", "transformers", "hivemind.averaging"} & sys.modules.keys()
import hivemind
from hivemind.utils import MPFuture, get_logger
from hivemind.averaging import DecentralizedAverager
assert hivemind.DHT is sys.modules["hivemind.dht.dht"].DHT
assert hivemind.DecentralizedAverager is DecentralizedAverager
assert hivemind.p2p.P2P is swarm.dht.kademlia.Libp2pTransport.start.__globals__["P2P"]
assert hivemind.utils.nested_flatten and hivemind.__version__
try:
    hivemind.no_such_thing
except AttributeError as error:
    print(error)
"""

FIRST = """
import hivemind, swarm.dht.kademlia
assert type(hivemind).__name__ == "module" and hivemind.DHT
print("as it was")
"""


def said_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_network_imports_no_torch_and_hivemind_stays_whole() -> None:
    assert said_by(CODE) == "module 'hivemind' has no attribute 'no_such_thing'"


def test_a_hivemind_that_was_imported_before_is_left_alone() -> None:
    assert said_by(FIRST) == "as it was"
