"""The model as transformers itself runs it, whole and in float32: what speed and answers are held against."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarm.blocks.models import Model

REFERENCE = "transformers.generate float32"


class Reference:
    """`model` unsplit, in float32. Its methods block."""

    def __init__(self, model: Model):
        self._whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
        self._whole.generation_config.eos_token_id = None
        self._checked: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}

    def generate(self, prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        """Seconds that `count` greedy tokens after `prompt` took, and the tokens."""
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self._whole.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - started, out[0, len(prompt) :].tolist()

    def decode_rate(self, prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        """Tokens a second after the first of `count`, and the tokens."""
        first, _ = self.generate(prompt, 1)
        whole, tokens = self.generate(prompt, count)
        return (count - 1) / (whole - first), tokens

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Logits [answer tokens, vocabulary] from which each token of `answer` was to be chosen."""
        logits: Tensor = self._whole(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1]

    def gives(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether greedy choices alone continue `prompt` with `answer`, found out in one pass without KV."""
        key = tuple(prompt), tuple(answer)
        if key not in self._checked:
            self._checked[key] = self.logits(prompt, answer).argmax(-1).tolist() == list(answer)
        return self._checked[key]
