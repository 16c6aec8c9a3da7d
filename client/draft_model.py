"""A draft model: a small causal language model on this machine that shares the big one's vocabulary.

Owns its weights, the thread it runs on, and for each sequence the KV of what it has read. Knows nothing of
the swarm, nor what becomes of a draft.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from swarm.blocks.models import Model, resolve
from swarm.blocks.precision import choose_device, choose_precision
from swarm.blocks.shard import stored_dtype
from swarm.client.sampling import Sampler
from swarm.client.speculation import MAX_DRAFT, Acceptance
from swarm.errors import InputError
from swarm.kernels.linear import make_linears_lean
from swarm.spans import Span

PRIOR = 0.6
"""How often a drafted token is taken to be right until that was seen."""

READING_CHUNK = 64
"""Tokens of a prompt read at once; between them a drafter that is not needed any more stops."""

SECONDS_DECAY = 0.8


class DraftModel:
    """A model that drafts. `seconds_each` is what a token of a draft takes, measured."""

    def __init__(self, module: Any, vocab_size: int):
        """`module` is a causal language model of transformers; what it drafts is below `vocab_size`."""
        self.vocab_size = min(vocab_size, int(module.config.get_text_config().vocab_size))
        self.context = int(module.config.get_text_config().max_position_embeddings)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="draft-model")
        self._module = module
        self.seconds_each = 0.0
        cache = DynamicCache()
        for _ in range(2):  # the first run also sets things up
            started = time.perf_counter()
            self.logits([0], cache)
            self.seconds_each = time.perf_counter() - started

    @classmethod
    def load(cls, name: str, tokenizer: Any, vocab_size: int) -> Self:
        """The model that `name` stands for, to draft for one with that tokenizer and vocabulary. Blocks.

        Raises:
            InputError: there is no such model, it cannot be loaded or rolled back, or its vocabulary is
                another.
            SwarmError: it has to be downloaded and cannot be.
        """
        model = resolve(name)
        model.ensure_files(Span(0, model.num_blocks), with_head=True)
        try:
            _check_vocabulary(model, tokenizer)
            module = _module(model)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"The draft model {name} cannot be loaded: {str(error).splitlines()[0]}",
                "Draft with a model that transformers loads from safetensors, or without one.",
            ) from error
        if module._is_stateful:
            raise InputError(
                f"The draft model {name} cannot take back tokens that it has read.",
                "Draft with a model whose attention is not recurrent.",
            )
        return cls(module, vocab_size)

    def drafter(self, tokens: Sequence[int], sampler: Sampler) -> "ModelDrafter":
        """Drafts for the sequence that begins with `tokens`, chosen as `sampler` does."""
        return ModelDrafter(self, tokens, sampler)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Float32 logits [vocabulary] after `tokens`, which follow what is in `cache` and are added to it."""
        ids = torch.tensor([list(tokens)], device=self._module.device)
        output = self._module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1, : self.vocab_size].float().cpu()

    def took(self, seconds: float) -> None:
        """Learn what a drafted token takes."""
        self.seconds_each += (1 - SECONDS_DECAY) * (seconds - self.seconds_each)

    def close(self) -> None:
        """End the thread, after what it is computing. Safe to call again."""
        self.thread.shutdown(wait=False, cancel_futures=True)


class ModelDrafter:
    """Drafts of one sequence. It reads the prompt in the background, and has no odds to give until then."""

    def __init__(self, model: DraftModel, tokens: Sequence[int], sampler: Sampler):
        self._model = model
        self._sampler = sampler
        self._tokens = list(tokens)
        self._read: list[int] = []
        """The tokens whose KV is in the cache, as far as they are those of the sequence."""
        self._cache = DynamicCache()
        self._drafted: list[int] = []
        """What was drafted after the newest token and is not judged."""
        self._acceptance = Acceptance(PRIOR)
        self._is_closed = False
        self._reading: Future[None] = model.thread.submit(self._read_prompt, self._tokens[:-1])

    @property
    def seconds_each(self) -> float:
        return self._model.seconds_each

    def push(self, token: int) -> None:
        if self._drafted:
            was_right = self._drafted.pop(0) == token
            self._acceptance.learn(was_right)
            if not was_right:
                self._drafted.clear()
        else:
            self._acceptance.fade()
        at = len(self._tokens)
        if at < len(self._read) and self._read[at] != token:
            del self._read[at:]
        self._tokens.append(token)

    def odds(self) -> Sequence[float]:
        fits = len(self._tokens) + MAX_DRAFT <= self._model.context
        if not self._reading.done() or not fits or max(self._tokens) >= self._model.vocab_size:
            return ()
        return [self._acceptance.rate] * MAX_DRAFT

    async def draft(self, count: int) -> list[int]:
        loop = asyncio.get_running_loop()
        self._drafted = await loop.run_in_executor(self._model.thread, self._draft, count)
        return list(self._drafted)

    def close(self) -> None:
        self._is_closed = True

    def _read_prompt(self, tokens: Sequence[int]) -> None:
        if max(tokens, default=0) >= self._model.vocab_size:
            return
        for at in range(0, min(len(tokens), self._model.context), READING_CHUNK):
            if self._is_closed:
                return
            self._run(tokens[at : at + READING_CHUNK])

    def _draft(self, count: int) -> list[int]:
        del self._read[len(self._tokens) - 1 :]
        refused = self._cache.get_seq_length() - len(self._read)
        if refused:
            self._cache.crop(-refused)
        drafted: list[int] = []
        fresh = self._tokens[len(self._read) :]
        while len(drafted) < count:
            started = time.perf_counter()
            logits = self._run(fresh)
            drafted.append(self._sampler.choose([*self._tokens, *drafted], logits))
            if len(fresh) <= 2:
                self._model.took(time.perf_counter() - started)
            fresh = drafted[-1:]
        return drafted

    def _run(self, tokens: Sequence[int]) -> torch.Tensor:
        logits = self._model.logits(tokens, self._cache)
        self._read += tokens
        return logits


def _check_vocabulary(model: Model, tokenizer: Any) -> None:
    if AutoTokenizer.from_pretrained(model.path).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"The draft model {model.name} has another vocabulary than the model it is to draft for.",
            "Draft with a smaller model of the same family.",
        )


def _module(model: Model) -> Any:
    """The whole model, as precise as a shard of it would be on this machine."""
    device = choose_device("auto")
    precision = choose_precision("auto", device, stored_dtype(model.checkpoint, None))
    module: Any = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=precision.dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    if precision.linear_dtype is not None:
        make_linears_lean(module, precision.linear_dtype)
    return module.to(device).requires_grad_(False).eval()
