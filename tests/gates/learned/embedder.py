"""An `/v1/embeddings` endpoint whose vectors are known: a direction for each topic, and noise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.http import answering

TOPICS = ("algebra", "poetry", "history", "chemistry", "law", "music", "football", "cooking")
WIDTH = 32
_DIRECTIONS = np.random.default_rng(0).normal(size=(len(TOPICS), WIDTH))


def vector(text: str) -> list[float]:
    noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)
    direction = _DIRECTIONS[[topic in text for topic in TOPICS]].sum(axis=0)
    made: list[float] = (direction + 0.3 * noise).tolist()
    return made


@dataclass
class Endpoint:
    url: str = ""
    batches: list[int] = field(default_factory=list)
    broken: bool = False

    async def embeddings(self, request: Request) -> JSONResponse:
        body: dict[str, Any] = await request.json()
        self.batches.append(len(body["input"]))
        if self.broken:
            return JSONResponse({"error": "out of order"}, 500)
        data = [{"index": n, "embedding": vector(text)} for n, text in enumerate(body["input"])]
        return JSONResponse({"object": "list", "data": data[::-1], "model": body["model"]})


@contextmanager
def embedding() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    with answering(Starlette(routes=[Route("/v1/embeddings", endpoint.embeddings, methods=["POST"])])) as url:
        endpoint.url = f"{url}/v1"
        yield endpoint
