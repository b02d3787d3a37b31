"""Embeddings of questions, in batches: by a small model in this process, or by any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import httpx2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr, model_validator

from moa_ray.errors import EngineUnavailable, MoARayError, SpecError

LOCAL = "all-minilm-l6-v2"
_LONGEST_REASON = 200


class EmbeddingOptions(BaseModel):
    """Keys of `embeddings` of a learned gate."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = LOCAL
    """A name of the catalogue, a folder or a Hugging Face id of a BERT-like model; or the endpoint's model id."""
    base_url: str | None = Field(None, pattern=r"^https?://[^\s/]+")
    """An endpoint with `/embeddings`, `/v1` included; not given: the model runs in the gate's own process."""
    api_key: SecretStr | None = None
    """The endpoint's key, most often `${SOME_KEY}`."""
    batch: PositiveInt = 16
    """Texts that are embedded at once at most."""
    timeout_s: PositiveFloat = 30.0
    """Longest wait for the endpoint's answer."""

    @model_validator(mode="after")
    def _key_has_endpoint(self) -> EmbeddingOptions:
        if self.api_key and not self.base_url:
            raise ValueError("an api_key without a base_url is for nobody")
        return self


class Model(Protocol):
    """Turns texts into vectors."""

    async def embed(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        """Vectors (N, D) of N texts, of any length.

        Raises:
            EngineUnavailable: If there are none.
        """
        ...

    async def close(self) -> None:
        """Give back what the model holds."""
        ...


def model_of(options: EmbeddingOptions) -> Model:
    """The model that `options` describe, loaded.

    Raises:
        ModelNotFound: If there is no such model here.
        SpecError: If what it needs is not installed.
    """
    if options.base_url:
        return _Endpoint(options)
    from moa_ray.gates.learned.local import Encoder

    return Encoder(options.model)


class Embedder:
    """Turns texts into vectors of length 1. Texts that come while others are embedded share the next batch.

    Args:
        model: Makes the vectors.
        batch: Texts that it is given at once at most.
    """

    def __init__(self, model: Model, batch: int) -> None:
        self._model, self._batch = model, batch
        self._waiting: list[tuple[str, asyncio.Future[NDArray[np.float32]]]] = []
        self._working: asyncio.Task[None] | None = None

    async def one(self, text: str) -> NDArray[np.float32]:
        """The vector of a text, (D,).

        Raises:
            EngineUnavailable: If the model does not give one.
        """
        future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def many(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of texts, (N, D). Raises as `one` does."""
        starts = range(0, len(texts), self._batch)
        return np.concatenate([await self._unit(texts[at : at + self._batch]) for at in starts])

    async def close(self) -> None:
        """Give back what the model holds."""
        await self._model.close()

    async def _work(self) -> None:
        await asyncio.sleep(0)  # what comes in this turn of the loop goes along
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            wanted = [(text, future) for text, future in batch if not future.done()]  # some are waited for no longer
            if not wanted:
                continue
            try:
                vectors = await self._unit([text for text, _ in wanted])
            except MoARayError as error:
                for _, future in wanted:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(wanted, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)

    async def _unit(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = await self._model.embed(texts)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise EngineUnavailable(f"the embedding model gave {vectors.shape} numbers for {len(texts)} texts")
        unit: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return unit


class _Endpoint:
    """A `Model` behind `/v1/embeddings`."""

    def __init__(self, options: EmbeddingOptions) -> None:
        key = options.api_key.get_secret_value() if options.api_key else "none"
        self._url, self._model = (options.base_url or "").rstrip("/"), options.model
        headers = {"authorization": f"Bearer {key}"}
        self._client = httpx2.AsyncClient(base_url=self._url, headers=headers, timeout=options.timeout_s)

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        body = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        try:
            response = await self._client.post("/embeddings", json=body)
            response.raise_for_status()
            data = sorted(response.json()["data"], key=lambda each: each["index"])
            return np.array([each["embedding"] for each in data], np.float32)
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST_REASON]
            raise EngineUnavailable(f"no embeddings from {self._url}: {reason}") from None

    async def close(self) -> None:
        await self._client.aclose()


def checked_width(vector: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """`vector`, if it has the width that a gate was made for.

    Raises:
        SpecError: If not: another embedding model is behind the endpoint.
    """
    if vector.shape[-1] != width:
        raise SpecError(f"the gate was trained on embeddings of {width} numbers, these have {vector.shape[-1]}")
    return vector
