"""Fuzz the API from its own OpenAPI document with schemathesis: no fault, nothing that the document denies.

`python -m tests.fuzz_api [--examples 1000] [--url http://127.0.0.1:8000/]` does it at length, over a toy
swarm or against a server that runs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.toy_api import toy_api

COMMAND = ["-m", "schemathesis.cli", "run", "--no-color", "--request-timeout", "30"]
CHECKS = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
"""What the document allows may still be refused: some parameters are not for each other."""


def fuzz(url: str, *options: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """What schemathesis found at `url`, in words; its exit code is 0 where that is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *COMMAND, *CHECKS, *options, f"{url}openapi.json"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1000, help="of each path")
    parser.add_argument("--url", help="of a server that runs; a toy swarm if left out")
    args = parser.parse_args(arguments)
    options = ["-n", str(args.examples), "--continue-on-failure"]
    if args.url:
        done = fuzz(args.url, *options)
    else:
        with toy_api() as url:
            done = fuzz(url, *options)
    print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
