"""A causal language model whose blocks run in a swarm, for code that was written for transformers or Petals.

Owns the way from token ids to logits, and which session an answer is written in; the answer itself is
written by transformers' own `generate`. Must not know of rows, routes or peers.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from swarm.blocks.architecture import load_config
from swarm.blocks.head import Head
from swarm.blocks.models import DEFAULT_MODEL, Model
from swarm.client.api import connect_sync
from swarm.client.blocking import BlockingSwarm
from swarm.client.facade import context_length
from swarm.client.joining import OnProgress
from swarm.client.model.arguments import Arguments, usable
from swarm.client.model.blocks import RemoteModel, WordEmbeddings
from swarm.client.model.session import InferenceSession, active
from swarm.client.options import SessionKeywords
from swarm.client.routes import OnWaiting
from swarm.errors import InputError
from swarm.option_values import PEERS_VARIABLE

PASSED_ON = ("tokenizer", "assistant_tokenizer")
"""What transformers' `generate` hands to `forward` besides its arguments; it means nothing there."""


class AutoDistributedModelForCausalLM(PreTrainedModel, GenerationMixin):
    """The model of any family, embeddings and head on this machine, blocks on the servers of a swarm.

    A frozen `torch.nn.Module`, made by `from_pretrained`. `model` (as in transformers) and `transformer` (as
    in Petals) are the model without its `lm_head`; `swarm` is the client beneath, which knows routes and
    peers. A context manager; it also leaves the swarm once nobody holds it any more.
    """

    base_model_prefix = "model"

    def __init__(self, swarm: BlockingSwarm, ends: Head, config: PreTrainedConfig):
        super().__init__(config)
        self.swarm = swarm
        self.model = RemoteModel(swarm, ends)
        self.lm_head = ends.module.get_output_embeddings()
        self.generation_config = usable(copy.deepcopy(ends.generation_config))
        self._ends = ends
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path = DEFAULT_MODEL,
        *,
        initial_peers: Sequence[str] | str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        timeout: float = 60.0,
        identity: Path | str | None = None,
        on_waiting: OnWaiting = lambda reason: None,
        on_progress: OnProgress | None = None,
        **sessions: Unpack[SessionKeywords],
    ) -> Self:
        """Join the swarm of `initial_peers` and wait until its servers cover the model `name`.

        Args:
            name: an alias, a hub repository or a local folder.
            initial_peers: multiaddrs of servers, as they print them; those in SWARM_INITIAL_PEERS if None.
            dtype: of embeddings and head on this machine, as for a server; `torch_dtype` is the same.
            revision: the branch, tag or commit of a hub repository.
            timeout: seconds that a route through all blocks is waited for, now and for each session.
            identity: the file with this peer's key; a new identity each time without one.
            on_waiting, on_progress, sessions: see `swarm.connect`.

        Raises:
            InputError: an option, the model or an address cannot be used, or there is no address.
            NoRoute: within `timeout` no route came up; says what is missing and who is loading.
            SwarmError: no initial peer can be reached.
            TypeError: there is no such option.
        """
        wanted = torch_dtype if dtype is None else dtype
        if initial_peers is None:
            initial_peers = os.environ.get(PEERS_VARIABLE, "").replace(",", " ").split()
        swarm = connect_sync(
            initial_peers,
            f"{name}@{revision}" if revision else str(name),
            timeout=timeout,
            identity=identity,
            dtype="auto" if wanted is None else str(wanted).removeprefix("torch."),
            on_waiting=on_waiting,
            on_progress=on_progress,
            **sessions,
        )
        return cls.of(swarm)

    @classmethod
    def of(cls, swarm: BlockingSwarm) -> Self:
        """The model of a client that has joined already, which is closed with it."""
        model, ends = swarm.swarm.model, swarm.swarm.ends
        assert isinstance(model, Model)
        assert isinstance(ends, Head)
        config = load_config(str(model.path))
        config._attn_implementation = "eager"  # none is run here
        return cls(swarm, ends, config)

    @property
    def transformer(self) -> RemoteModel:
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self._ends.dtype

    def get_input_embeddings(self) -> WordEmbeddings:
        return self.model.embed_tokens

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """A session of at most `max_length` tokens a row, for `generate`, `forward` or hidden states.

        Within its `with` statement, in the same thread, `generate` goes on with it by itself.

        Raises:
            InputError: the model takes fewer tokens.
        """
        return self.model.layers.inference_session(max_length=max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InferenceSession | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of what follows each token, as transformers' models give them; no gradients.

        Args:
            input_ids: int [batch, tokens], or instead of them `inputs_embeds`, [batch, tokens, hidden].
            attention_mask: 0 for padding, on either side; [batch, tokens], with those of the session before.
            past_key_values: an `inference_session` to go on with; without one all is forgotten afterwards.
            logits_to_keep: for so many of the last tokens, all if 0.

        Returns:
            CausalLMOutputWithPast with float32 `logits` [batch, logits_to_keep, vocabulary], zeros for
            padding; a tuple if `return_dict` is False.

        Raises:
            InputError: an argument cannot be used here, or shapes do not fit.
            SwarmError: servers were lost for which there are no others.
        """
        unknown = [
            name
            for name, value in others.items()
            if value is not None and value is not False and name not in PASSED_ON
        ]
        if unknown:
            raise InputError(f"forward cannot take {', '.join(unknown)} over a swarm.")
        if use_cache and past_key_values is None:
            raise InputError(
                "use_cache=True needs a place to keep what servers have computed.",
                "Give past_key_values=model.inference_session(max_length=…).",
            )
        hidden, shown = self.model.run(
            input_ids, inputs_embeds, attention_mask, past_key_values, logits_to_keep
        )
        found = self._ends.logits(hidden[shown])
        logits = torch.zeros(*shown.shape, found.shape[-1])
        logits[shown] = found
        output = CausalLMOutputWithPast(logits=logits.to(self.device), past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        session: InferenceSession | None = None,
        **keywords: Any,
    ) -> Any:
        """Write answers, as transformers' `generate` does, token for token the same in float32.

        Without a `session` nothing is kept. With one, `inputs` [batch, tokens] follow what was said in it
        before; without `inputs` the answer goes on. What comes back then begins with `inputs`, too.

        Args:
            inputs: int [batch, tokens], padded on the left as `attention_mask` tells; or else `input_ids`.
            generation_config: settings; those among the keywords come first, the model's own last.
            keywords: transformers' settings and inputs, `streamer`, `stopping_criteria`, `logits_processor`
                among them. A batch of up to 32 rows goes through the swarm at the same time.

        Raises:
            InputError: an argument is unknown or cannot be honoured over a swarm (beams, a cache of one's
                own), or the session does not fit.
            ValueError: as transformers' `generate`, where arguments contradict each other.
            SwarmError: servers were lost for which there are no others.
        """
        arguments = Arguments(self.generation_config, generation_config, keywords)
        if inputs is None:
            inputs = keywords.pop("input_ids", None)
        if session is None and (running := active.get()) is not None and running.belongs_to(self.swarm):
            session = running
        if session is not None:
            return self._go_on(session, arguments, inputs, generation_config, keywords)
        prompt = inputs if inputs is not None else keywords.get("inputs_embeds")
        room = arguments.length(prompt.shape[1] if prompt is not None else 1)
        context = context_length(self.swarm.swarm.model)
        session = InferenceSession(self.swarm, self.model.layers.span, max_length=context, room=room)
        try:
            return self._write(session, arguments, inputs, generation_config, keywords)
        finally:
            session.close()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """
        Raises:
            InputError: always, since the blocks are elsewhere.
        """
        raise InputError("A model whose blocks are in a swarm cannot be saved.")

    def close(self) -> None:
        """Leave the swarm. Safe to call again."""
        self.swarm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _go_on(
        self,
        session: InferenceSession,
        arguments: Arguments,
        inputs: Tensor | None,
        config: GenerationConfig | None,
        keywords: dict[str, Any],
    ) -> Any:
        """An answer that follows what was said in `session`; what was said before is not in the result."""
        if not session.belongs_to(self.swarm):
            raise InputError("This session is not one of this model's.", "Make it by its inference_session.")
        if session.takes_hidden or keywords.get("inputs_embeds") is not None:
            raise InputError(
                "In a session, generate has to know all tokens, and here hidden states were given.",
                "Give tokens, or inputs_embeds without a session.",
            )
        said = session.continue_from()
        if said:
            inputs, keywords["attention_mask"] = session.continued(inputs, keywords.get("attention_mask"))
        result = self._write(session, arguments, inputs, config, keywords)
        if isinstance(result, Tensor):
            return result[:, said:]
        result.sequences = result.sequences[:, said:]
        return result

    def _write(
        self,
        session: InferenceSession,
        arguments: Arguments,
        inputs: Tensor | None,
        config: GenerationConfig | None,
        keywords: dict[str, Any],
    ) -> Any:
        sequences = None
        session.begin_answer(arguments.ends)
        try:
            itself: Any = self  # transformers asks for more of it than it says
            result: Any = GenerationMixin.generate(
                itself, inputs, config, past_key_values=session, **keywords
            )
            sequences = result if isinstance(result, Tensor) else result.sequences
        finally:
            session.end_answer(sequences)
        return result
