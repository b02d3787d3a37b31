"""Embeddings by a model in this process: a BERT-like encoder, and the mean of its tokens.

This is what Sentence-BERT does (Reimers and Gurevych 2019, section 3).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moa_ray.engines import catalogue
from moa_ray.errors import SpecError

_LONGEST_TEXT = 256
"""Tokens of a text that are looked at: as many as all-MiniLM-L6-v2 was trained on."""
_MOST_THREADS = 4
_LONGEST_REASON = 200


class Encoder:
    """A `Model` of embeddings, (N, D) for N texts.

    Args:
        name: A name of the catalogue, a folder, or a Hugging Face id.

    Raises:
        ModelNotFound: If there is no such model.
        SpecError: If it cannot be loaded, or torch and transformers are not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            hint = "pip install 'moa-ray[gate,moe]', or name an endpoint: embeddings: {base_url: …, model: …}"
            raise SpecError("embeddings in this process need torch and transformers", hint=hint) from error
        logging.disable_progress_bar()
        folder = catalogue.folder(name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:_LONGEST_REASON]
            raise SpecError(f"the embedding model {name} cannot be loaded: {reason}") from None
        torch.set_num_threads(min(_MOST_THREADS, os.cpu_count() or 1))

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean of each text's last hidden states, in a thread of its own."""
        return await asyncio.to_thread(self._embed, list(texts))

    async def close(self) -> None:
        """Nothing to give back."""

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        tokens = self._tokenizer(texts, truncation=True, max_length=_LONGEST_TEXT)["input_ids"]
        by_length = sorted(range(len(texts)), key=lambda n: len(tokens[n]))
        rows: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
        for group in _alike([len(tokens[n]) for n in by_length]):
            numbers = by_length[group]
            for number, vector in zip(numbers, self._forward([tokens[n] for n in numbers]), strict=True):
                rows[number] = vector
        return np.stack(rows)

    def _forward(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        """Vectors (N, D) of N texts that are about as long."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        with torch.inference_mode():
            ids_NT = pad_sequence([torch.tensor(each) for each in tokens], batch_first=True)
            mask_NT = pad_sequence([torch.ones(len(each), dtype=torch.long) for each in tokens], batch_first=True)
            states_NTD = self._model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
            mean_ND = (states_NTD * mask_NT[..., None]).sum(dim=1) / mask_NT.sum(dim=1, keepdim=True)
        vectors: NDArray[np.float32] = mean_ND.float().numpy()
        return vectors


def _alike(lengths: list[int]) -> Iterator[slice]:
    """Runs of sorted lengths of which the longest is so little longer than the shortest that padding costs little."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] > lengths[start] * 1.25 + 4:
            yield slice(start, end)
            start = end
