"""A Mixture-of-Experts checkpoint of Hugging Face that answers chats, its experts in the actors of a pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from moa_ray.moe.errors import CheckpointError, PoolError
from moa_ray.moe.remote.hf import shard_experts

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw tokens; `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class ChatModel:
    """Model, tokenizer and pool; several answers may be generated at once, each in its own thread.

    Args:
        directory: A checkpoint with its tokenizer and chat template.
        options: As in `shard_experts`, `shards` among them.

    Raises:
        CheckpointError: The directory lacks a model, experts, a tokenizer or a chat template.
        PoolError: The model has no experts, or such as cannot be moved.
        ResourcesShort: A shard has nowhere to run; nothing is left behind.
    """

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory}: no tokenizer of transformers: {error}") from error
        if not self._tokenizer.chat_template:
            raise CheckpointError(f"{directory}: the tokenizer has no chat template", hint="an instruct model")
        self._model: Any = shard_experts(directory, **options).eval()
        config = self._model.config
        self.context_window: int | None = getattr(config, "max_position_embeddings", None)
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}

    def close(self) -> None:
        """Ends the pool's actors."""
        self._model.expert_pool.close()

    def encode(self, messages: Messages) -> list[int]:
        """Tokens of a conversation; a last message of the assistant is left open, to be continued.

        Raises:
            PoolError: The chat template refuses the messages.
        """
        goes_on = bool(messages) and messages[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on, "return_dict": False}
        try:
            tokens: list[int] = self._tokenizer.apply_chat_template(list(messages), tokenize=True, **how)
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            raise PoolError(f"the model's chat template refuses the messages: {error}") from error
        return tokens

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], most: int, draw: Draw) -> Iterator[str | None]:
        """The pieces of an answer, one a token; None instead of the last one where the model ends it.

        A piece may be empty: a character whose bytes are not all there yet.

        Args:
            prompt: As from `encode`.
            most: Tokens at most.
            draw: How to choose them.
        """
        cache = transformers.DynamicCache(config=self._model.config)
        text = DecodeStream(skip_special_tokens=True)
        generator = torch.Generator().manual_seed(draw.seed) if draw.seed is not None else torch.Generator()
        if draw.seed is None:
            generator.seed()
        inputs_BT = torch.tensor([list(prompt)])
        for _ in range(most):
            # Only the last position's logits: those of a long prompt would not fit anywhere.
            said = self._model(input_ids=inputs_BT, cache=cache, use_cache=True, logits_to_keep=1)
            token = _choose(said.logits[:, -1].float(), draw, generator)
            if token in self._ends:
                yield None
                return
            yield text.step(self._tokenizer.backend_tokenizer, token) or ""
            inputs_BT = torch.tensor([[token]])


def _choose(logits_BV: Tensor, draw: Draw, generator: torch.Generator) -> int:
    if draw.temperature == 0:
        return int(logits_BV.argmax())
    nothing: Any = None  # these two look at the scores alone
    scores_BV = TemperatureLogitsWarper(draw.temperature)(nothing, logits_BV)
    if draw.top_p < 1:
        scores_BV = TopPLogitsWarper(draw.top_p)(nothing, scores_BV)
    return int(torch.multinomial(scores_BV.softmax(-1), 1, generator=generator))
