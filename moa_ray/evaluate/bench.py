"""Load on an OpenAI-compatible endpoint, from finding its model to the last answer."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import SecretStr

from moa_ray.engines.openai_api import OpenAIEngine, OpenAIOptions
from moa_ray.engines.protocol import Chunk, EngineRequest, Sampling
from moa_ray.errors import ModelNotFound, RequestError, ServerUnreachable
from moa_ray.evaluate.load import Sample, arrivals, closed_loop, open_loop
from moa_ray.evaluate.prompts import from_file, made_up
from moa_ray.graph import Message
from moa_ray.graph.source import which

KEY = "OPENAI_API_KEY"
_LOOK_TIMEOUT_S = 10.0
_CALLERS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of which endpoint, how.

    Args:
        url: Its base URL.
        model: The model to ask; None for the first that it lists.
        count: Requests that are counted.
        callers: Of a closed loop.
        rate: Requests a second of an open loop; None for a closed one.
        burstiness: Of an open loop; see `arrivals`.
        warmups: Requests before, which are not counted.
        file: Of prompts; None for words drawn at random.
        words: Of a prompt, where there is no file.
        max_tokens: Of an answer.
        timeout_s: Longest time of a request.
        seed: Of prompts and times.

    Raises:
        RequestError: If it is a closed and an open loop at once.
    """

    url: str
    model: str | None
    count: int
    callers: int | None
    rate: float | None
    burstiness: float
    warmups: int
    file: Path | None
    words: int
    max_tokens: int
    timeout_s: float
    seed: int

    def __post_init__(self) -> None:
        if self.callers and self.rate:
            raise RequestError(
                "--max-concurrency and --request-rate: an open loop that waits for answers is none",
                hint="give one of them",
            )

    def about(self, model: str) -> dict[str, Any]:
        """What its figures are figures of, so that a result file can be told from another."""
        closed = self.rate is None
        return {
            "model": model,
            "url": self.url,
            "num_prompts": self.count,
            "max_concurrency": (self.callers or _CALLERS) if closed else None,
            "request_rate": self.rate,
            "burstiness": None if closed else self.burstiness,
            "seed": self.seed,
        }

    def prompts(self) -> list[tuple[Message, ...]]:
        """Those of the warm-up, then those that count.

        Raises:
            RequestError: If the file holds something else.
        """
        total = self.warmups + self.count
        return from_file(self.file, total) if self.file else made_up(total, self.words, self.seed)


def find_model(load: Load) -> str:
    """The model to ask: the one that is named, if the endpoint has it, or its first.

    Raises:
        ServerUnreachable: If nothing answers at the URL.
        ModelNotFound: If it has no such model.
        RequestError: If it lists none, and none is named.
    """
    key = os.environ.get(KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx2.get(f"{load.url.rstrip('/')}/models", headers=headers, timeout=_LOOK_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        hint = "give the base URL, such as http://127.0.0.1:8000/v1"
        raise ServerUnreachable(f"cannot reach {load.url}: {error}", hint=hint) from None
    known: list[str] = []
    with suppress(ValueError, KeyError, TypeError):  # an endpoint may have no list
        known = [card["id"] for card in response.json()["data"]]
    if not known and not load.model:
        hint = f"give the base URL, such as http://127.0.0.1:8000/v1, or a --model; set {KEY} if it wants a key"
        raise RequestError(f"{load.url} lists no models (HTTP {response.status_code})", hint=hint)
    if load.model and known and load.model not in known:
        hint = which(load.model, known)
        raise ModelNotFound(f"{load.url} has no model {load.model!r}", hint=hint)
    return load.model or known[0]


async def measure(
    load: Load, model: str, prompts: Sequence[tuple[Message, ...]], ended: Callable[[Sample], None]
) -> float:
    """Put the load on the endpoint; the seconds that it took."""
    key = os.environ.get(KEY)
    options = OpenAIOptions(
        base_url=str(httpx2.URL(load.url)),  # with its scheme in small letters
        api_key=SecretStr(key) if key else None,
        idle_timeout_s=load.timeout_s,
        connect_timeout_s=load.timeout_s,  # a burst of connections takes this process a while
    )
    engine = OpenAIEngine(model, options)
    sampling = Sampling(temperature=0.0, max_tokens=load.max_tokens)

    def ask(prompt: tuple[Message, ...]) -> AsyncGenerator[Chunk, None]:
        return engine.stream(EngineRequest("bench", prompt, sampling))

    warm, asked = prompts[: load.warmups], prompts[load.warmups :]
    try:
        await closed_loop(ask, warm, 1, timeout_s=load.timeout_s, ended=lambda _: None)
        if load.rate is None:
            return await closed_loop(ask, asked, load.callers or _CALLERS, timeout_s=load.timeout_s, ended=ended)
        times = arrivals(load.rate, load.count, burstiness=load.burstiness, seed=load.seed)
        return await open_loop(ask, asked, times, timeout_s=load.timeout_s, ended=ended)
    finally:
        await engine.close()
