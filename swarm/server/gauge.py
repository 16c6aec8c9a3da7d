"""How fast an engine is: measured by running it, and remembered on this machine for the next start.

Owns the files in which rates are kept, one for each setting that they depend on: the newest `MOST_KEPT`. Must
not know what rates are good for.
"""

import asyncio
import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from swarm.blocks.files import write_atomically
from swarm.dht.announcement import Rate, Throughput
from swarm.server.span_engine import SpanEngine

logger = logging.getLogger(__name__)

MOST_KEPT = 64


@dataclass(frozen=True)
class Setting:
    """What the rates of a server depend on; `dtype`, `quantization` and `device` are what was asked for."""

    hardware: str
    model_id: str
    blocks: int
    dtype: str
    quantization: str
    device: str
    threads: int
    version: str


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a file."""

    decode: Rate
    prefill: Rate


class Gauge:
    """Measures the engines of a server of that `setting`. Rates are kept in `folder`."""

    def __init__(self, setting: Setting, folder: Path):
        self._setting = setting
        self._folder = folder

    @property
    def path(self) -> Path:
        """The file of this setting."""
        return self._path(self._setting)

    def known(self) -> Throughput:
        """What was measured before in this setting; zero if nothing was."""
        return self._read(self._setting) or Throughput()

    async def rates(self, engine: SpanEngine) -> Throughput:
        """What was measured before in the setting that `engine` has in truth, or is measured now."""
        setting = replace(self._setting, threads=engine.threads)
        return await asyncio.to_thread(self._read, setting) or await self.measure(engine)

    async def measure(self, engine: SpanEngine) -> Throughput:
        """Run the engine, and keep what is found."""
        decode, prefill = await engine.measure()
        setting = replace(self._setting, threads=engine.threads)
        try:
            await asyncio.to_thread(self._keep, setting, Kept(decode, prefill))
        except OSError as error:
            logger.warning("this server's speed cannot be kept in %s: %s", self._folder, error.strerror)
        return Throughput(decode=decode, prefill=prefill)

    def _keep(self, setting: Setting, rates: Kept) -> None:
        write_atomically(self._path(setting), msgspec.json.encode(rates))
        files = sorted(self._folder.glob("*.json"), key=_written_at)
        for old in files[:-MOST_KEPT]:
            old.unlink(missing_ok=True)

    def _read(self, setting: Setting) -> Throughput | None:
        try:
            kept = msgspec.json.decode(self._path(setting).read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            return None
        return Throughput(decode=kept.decode, prefill=kept.prefill)

    def _path(self, setting: Setting) -> Path:
        digest = hashlib.sha256(msgspec.json.encode(asdict(setting))).hexdigest()
        return self._folder / f"{digest[:32]}.json"


def _written_at(file: Path) -> float:
    """In unix seconds; 0 if it is gone by now."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
