"""Text to numbers and back, and the windows that training reads.

Shape suffixes: S time steps, B streams of text.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moa_ray.moe.errors import ConfigError

Level = Literal["word", "byte"]
UNKNOWN = "<unk>"
NEWLINE = "<eos>"
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words or bytes by number.

    Attributes:
        level: `word`: split at white space, a newline is the word `<eos>`; `byte`: numbers 0 to 255.
        words: All words by falling frequency; empty at byte level.
    """

    level: Level
    words: Sequence[str] = ()

    @classmethod
    def of(cls, text: bytes, level: Level, size: int | None) -> Vocabulary:
        """The `size` most frequent words of a text (all if None), `<unk>` always among them."""
        if level == "byte":
            return cls("byte")
        counts = Counter(_words(text))
        counts[UNKNOWN] += 1
        # Ties are broken by the word itself, so that the numbering does not depend on the text's order.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[:size]
        if UNKNOWN not in ranked:
            ranked[-1] = UNKNOWN
        return cls("word", tuple(ranked))

    @property
    def separator(self) -> str:
        """What stands between two tokens of a text."""
        return "" if self.level == "byte" else " "

    def __len__(self) -> int:
        return 256 if self.level == "byte" else len(self.words)

    def encode(self, text: bytes) -> Tensor:
        """Numbers of a text, int64 of one dimension."""
        if self.level == "byte":
            return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
        number = {word: i for i, word in enumerate(self.words)}
        unknown = number[UNKNOWN]
        return torch.tensor([number.get(word, unknown) for word in _words(text)], dtype=torch.int64)

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of some numbers; broken UTF-8 shows as U+FFFD."""
        if self.level == "byte":
            return bytes(numbers).decode("utf-8", errors="replace")
        return " ".join("\n" if self.words[i] == NEWLINE else self.words[i] for i in numbers)


def _words(text: bytes) -> list[str]:
    return text.decode("utf-8", errors="replace").replace("\n", f" {NEWLINE} ").split()


def read_text(path: Path) -> bytes:
    """Reads a file, unpacked if it is gzip (dictzip is).

    Raises:
        ConfigError: The file cannot be read, or is empty.
    """
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
    except OSError as error:
        raise ConfigError(f"corpus {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"corpus {path}: broken gzip: {error}") from error
    if not text:
        raise ConfigError(f"corpus {path} is empty")
    return text


class Windows:
    """A text cut into B streams side by side, read S steps at a time.

    Window i follows window i - 1 in every stream, so that a model may carry its state over;
    after the last one the text begins again. The position is a function of the step alone, so
    a resumed run needs no other state.

    Args:
        numbers: The whole text.
        streams: B.
        steps: S, steps of a window.
        name: What an error calls the text.

    Attributes:
        layout: Size and shape of the text in words; texts of the same layout have the same places.

    Raises:
        ConfigError: The text is too short for one window.
    """

    def __init__(self, numbers: Tensor, streams: int, steps: int, *, name: str = "text") -> None:
        length = (len(numbers) - 1) // streams
        self.count = length // steps
        if self.count < 1:
            raise ConfigError(
                f"the {name} of {len(numbers)} tokens is too short for {streams} streams of {steps} steps",
                hint="fewer streams, a shorter window, or byte level",
            )
        self.steps = steps
        self.layout = f"{len(numbers)} tokens in {streams} streams of {steps} steps"
        used = length * streams
        self._inputs_LB = numbers[:used].view(streams, length).t().contiguous()
        self._targets_LB = numbers[1 : used + 1].view(streams, length).t().contiguous()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, each (S, B)."""
        begin = step % self.count * self.steps
        return self._inputs_LB[begin : begin + self.steps], self._targets_LB[begin : begin + self.steps]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(self.count))

    def starts_text(self, step: int) -> bool:
        """Whether a step reads the beginning of the streams, where the state must be fresh."""
        return step % self.count == 0
