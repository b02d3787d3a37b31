"""Text from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moa_ray.moe.checkpoint import load_checkpoint, load_weights
from moa_ray.moe.config import ModelConfig
from moa_ray.moe.errors import ConfigError
from moa_ray.moe.model import LanguageModel, State
from moa_ray.moe.text import Vocabulary


def load_model(path: Path) -> tuple[LanguageModel, Vocabulary]:
    """The model of a checkpoint, or of the newest one below a run's directory, in eval mode.

    Raises:
        CheckpointError: There is none, it is damaged, or its tensors do not fit its configuration.
    """
    saved = load_checkpoint(path)
    model = ModelConfig.model_validate(saved.model_config).build(len(saved.vocabulary))
    load_weights(model, saved.model)
    return model.eval(), saved.vocabulary


def generate(path: Path, prompt: str, *, tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """Continues a prompt.

    Args:
        path: A checkpoint, or a run's directory.
        prompt: Text to continue; empty: the model begins after a newline.
        tokens: Words or bytes to add.
        temperature: 0 always takes the likeliest; 1 samples the model's own distribution.
        seed: The same seed gives the same text.

    Returns:
        The new text without the prompt; at word level it begins with a space.

    Raises:
        CheckpointError: As `load_model`.
        ConfigError: A negative temperature or number of tokens.
    """
    if temperature < 0 or tokens < 0:
        raise ConfigError(f"temperature and tokens must not be negative, not {temperature} and {tokens}")
    model, vocabulary = load_model(path)
    draw = torch.Generator().manual_seed(seed)
    numbers = vocabulary.encode((prompt or "\n").encode())
    made = _continue(model, numbers, tokens, temperature, draw)
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
    return torch.multinomial((logits_V / temperature).softmax(0), 1, generator=draw)
