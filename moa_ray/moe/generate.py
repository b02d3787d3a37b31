"""Text from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from moa_ray.moe.checkpoint import load_checkpoint, load_weights
from moa_ray.moe.config import ModelConfig
from moa_ray.moe.errors import CheckpointError, ConfigError
from moa_ray.moe.model import LanguageModel, State
from moa_ray.moe.text import Vocabulary


def load_model(path: Path) -> tuple[LanguageModel, Vocabulary]:
    """The model of a checkpoint, or of the newest one below a run's directory, in eval mode.

    Raises:
        CheckpointError: There is none, it is damaged, or its tensors do not fit its configuration.
    """
    saved = load_checkpoint(path)
    try:
        config = ModelConfig.model_validate(saved.model_config)
    except ValidationError as error:
        raise CheckpointError(f"{path}: the checkpoint's model cannot be built: {error}") from error
    model = config.build(len(saved.vocabulary))
    load_weights(model, saved.model)
    return model.eval(), saved.vocabulary


def generate(path: Path, prompt: str, *, tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """Continues a prompt.

    Args:
        path: A checkpoint, or a run's directory.
        prompt: Text to continue; without any token: the model begins after a newline.
        tokens: Words or bytes to add.
        temperature: 0 always takes the likeliest; 1 samples the model's own distribution.
        seed: The same seed gives the same text.

    Returns:
        The new text without the prompt; at word level it begins with a space.

    Raises:
        CheckpointError: As `load_model`.
        ConfigError: A temperature that is negative or not finite, or a negative number of tokens.
    """
    if tokens < 0 or not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature and tokens must be finite and not negative, not {temperature} and {tokens}")
    model, vocabulary = load_model(path)
    draw = torch.Generator().manual_seed(seed)
    # Bytes of the command line that are no UTF-8 come as surrogates, and go back to what they were.
    numbers = vocabulary.encode(prompt.encode(errors="surrogateescape"))
    made = _continue(model, numbers if len(numbers) else vocabulary.encode(b"\n"), tokens, temperature, draw)
    return vocabulary.separator + vocabulary.decode(made)


@torch.no_grad()
def _continue(
    model: LanguageModel, prompt_S: Tensor, tokens: int, temperature: float, draw: torch.Generator
) -> list[int]:
    state: State | None = None
    inputs_S, made = prompt_S, list[int]()
    for _ in range(tokens):
        logits_SBV, state = model(inputs_S[:, None], state)
        inputs_S = _pick(logits_SBV[-1, 0], temperature, draw)
        made.append(int(inputs_S))
    return made


def _pick(logits_V: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_V.argmax(keepdim=True)
    # The likeliest at 0 and in float64: no temperature, however small, overflows.
    weights_V = (logits_V - logits_V.max()).double() / temperature
    return torch.multinomial(weights_V.softmax(0), 1, generator=draw)
