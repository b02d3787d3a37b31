"""What every plug-in asks a server with."""

from __future__ import annotations

import os
from typing import Any

from moa_ray.client import Answer, AsyncClient, Finished


def api_key() -> str | None:
    """The server's key where nothing else names one: that of the environment variable MOA_RAY_API_KEY, if it is set."""
    return os.environ.get("MOA_RAY_API_KEY")


async def streamed(client: AsyncClient, question: str, **asked: Any) -> Answer:
    """What `client.run` answers; asked as a stream, so that the engines stop when the caller is gone.

    Args:
        client: Who is asked.
        question: The user's question.
        asked: What else `AsyncClient.stream` takes.

    Raises:
        MoARayError: As `AsyncClient.stream` does.
    """
    *_, last = [event async for event in client.stream(question, **asked)]
    assert isinstance(last, Finished)
    return last.answer
