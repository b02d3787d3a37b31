"""A connection of Airflow's as a client of the server that it names."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseHook

from moa_ray.client import AsyncClient, Client
from moa_ray.errors import MoARayError
from moa_ray.integrations.asking import api_key


class MoAHook(BaseHook):  # type: ignore[misc]
    """Clients of one moa-ray server.

    They try nothing again: retries are the task's.

    Args:
        conn_id: A connection of type `moa_ray`: host, port, schema (`http` or `https`), the API key as password.
        server: The server's base URL, `/v1` included, in place of a connection; the key is then that of the
            environment variable MOA_RAY_API_KEY, if it is set.
    """

    conn_name_attr = "conn_id"
    default_conn_name = "moa_ray_default"
    conn_type = "moa_ray"
    hook_name = "moa-ray"

    def __init__(self, conn_id: str = default_conn_name, server: str = "") -> None:
        super().__init__()
        self.conn_id = conn_id
        self.server = server

    def get_conn(self) -> Client:
        """A client, to be closed by the caller."""
        return Client(**self._settings(None if self.server else self.get_connection(self.conn_id)))

    async def aget_conn(self) -> AsyncClient:
        """An asynchronous client, to be closed by the caller."""
        return AsyncClient(**self._settings(None if self.server else await self.aget_connection(self.conn_id)))

    def test_connection(self) -> tuple[bool, str]:
        """Whether the server answers, and with which models: what the form's *Test* button shows."""
        try:
            with self.get_conn() as client:
                return True, f"It serves {', '.join(client.models())}."
        except MoARayError as error:
            return False, str(error)

    def _settings(self, connection: Any) -> dict[str, Any]:
        if connection is None:
            return {"base_url": self.server, "api_key": api_key(), "retries": 0}
        port = f":{connection.port}" if connection.port else ""
        url = f"{connection.schema or 'http'}://{connection.host or '127.0.0.1'}{port}/v1"
        return {"base_url": url, "api_key": connection.password, "retries": 0}
