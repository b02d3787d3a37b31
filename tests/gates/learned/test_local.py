"""Embeddings by all-MiniLM-L6-v2 in this process, the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from moa_ray.engines import catalogue
from moa_ray.errors import ModelNotFound, SpecError
from moa_ray.gates.learned.embeddings import LOCAL, Embedder
from moa_ray.gates.learned.local import Encoder

TEXTS = (
    "Why is the sky blue?",
    "Sort a list in place. " * 20,
    "Hi",
    "What makes the sky look blue by day?",
    "x " * 900,
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


async def test_texts_of_all_lengths_at_once_are_embedded_as_hugging_face_embeds_each() -> None:
    embedder = Embedder(Encoder(LOCAL), batch=8)
    found = await embedder.many(TEXTS)
    folder = catalogue.folder(LOCAL)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            given = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
            wanted = torch.nn.functional.normalize(model(**given).last_hidden_state.mean(dim=1))[0].numpy()
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
    assert found[0] @ found[3] > 0.7 > found[0] @ found[1]


def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no model 'all-minilm'"):
        Encoder("all-minilm")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpecError, match="cannot be loaded"):
        Encoder(str(tmp_path))
