"""One request, made in Airflow's triggerer: agents think while no worker slot is held."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from moa_ray.errors import MoARayError
from moa_ray.integrations.airflow.hook import MoAHook
from moa_ray.integrations.asking import streamed


class MoATrigger(BaseTrigger):  # type: ignore[misc]
    """Asks a server, and fires with `{"text": ...}`, or with `{"error": ..., "retryable": ...}`.

    A triggerer that dies, or gives the trigger away, cuts the request off; the next one asks anew.

    Args:
        question: The user's question.
        asked: What else `AsyncClient.stream` takes.
        conn_id: A connection, as `MoAHook` takes it.
        server: A base URL in its place.
    """

    def __init__(self, question: str, asked: dict[str, Any], conn_id: str, server: str) -> None:
        super().__init__()
        self.question = question
        self.asked = asked
        self.conn_id = conn_id
        self.server = server

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Where the class is, and its arguments."""
        kwargs = {"question": self.question, "asked": self.asked, "conn_id": self.conn_id, "server": self.server}
        return f"{__name__}.{type(self).__name__}", kwargs

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Ask, and fire once."""
        yield TriggerEvent(await self._event())

    async def _event(self) -> dict[str, Any]:
        try:
            async with await MoAHook(self.conn_id, self.server).aget_conn() as client:
                answer = await streamed(client, self.question, **self.asked)
        except MoARayError as error:
            return {"error": str(error), "retryable": error.retryable}
        return {"text": answer.text}
