"""The connection as a block, and one call of a graph as a task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prefect import task
from prefect.blocks.core import Block
from prefect.logging import get_run_logger
from prefect.utilities.hashing import hash_objects
from pydantic import SecretStr

from moa_ray.client import Answer, AsyncClient
from moa_ray.errors import MoARayError, QuorumNotMet
from moa_ray.integrations.asking import api_key, streamed

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


class MoAServer(Block):  # type: ignore[misc]
    """A moa-ray server.

    Args:
        url: Its base URL, `/v1` included.
        api_key: Its key; not given: that of the environment variable MOA_RAY_API_KEY, if it is set.
    """

    _block_type_name: ClassVar[str] = "moa-ray server"
    _block_type_slug: ClassVar[str] = "moa-ray-server"

    url: str
    api_key: SecretStr | None = None

    def client(self) -> AsyncClient:
        """A client of it; the task's own retries are the only ones."""
        key = self.api_key.get_secret_value() if self.api_key else api_key()
        return AsyncClient(self.url, api_key=key, retries=0)


def _key(_: object, asked: Mapping[str, Any]) -> str:
    """What a kept answer is found by: what it is an answer to, and no matter which server gave it."""
    texts = _texts(asked["proposals"])
    parts = asked["graph"], asked["version"], asked["call"], asked["question"], texts
    return str(hash_objects(*parts, raise_on_failure=True))


def _may_help(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether to try again: not what no retry can save, and proposals that are missing stay so."""
    error = state.data
    return not isinstance(error, MoARayError) or (error.retryable and not isinstance(error, QuorumNotMet))


@task(
    task_run_name="{call}",
    cache_key_fn=_key,
    persist_result=True,
    retry_condition_fn=_may_help,
    retry_delay_seconds=[0.5, 1.0, 2.0, 4.0, 8.0],
    retry_jitter_factor=0.5,
)  # type: ignore[untyped-decorator]
async def ask(
    server: MoAServer,
    graph: str,
    call: str,
    question: str,
    proposals: Mapping[str, Answer | BaseException],
    *,
    needed: int = 1,
    required: Collection[str] = (),
    version: str = "",
) -> Answer:
    """Make one call of a graph, shown what the calls before it said.

    Its result is kept under what it was asked: asked the same again, it answers from there.

    Args:
        server: Who makes it.
        graph: The graph's name there.
        call: The call's id; `answer` is the aggregator.
        question: The user's question.
        proposals: Answers that it is shown, by their calls' ids; in place of one, why there is none.
        needed: How many of them there must be.
        required: Those that must be there in any case.
        version: Of the graph; another one is asked anew.

    Raises:
        QuorumNotMet: If too few of the proposals are there.
        MoARayError: What the server met.
    """
    texts = _texts(proposals)
    missing = {name: why for name, why in proposals.items() if name not in texts}
    reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
    if len(texts) < min(needed, len(proposals)) or not missing.keys().isdisjoint(required):
        raise QuorumNotMet(f"{call} sees {len(texts)} of {len(proposals)} proposals, which are too few ({reasons})")
    if missing:
        get_run_logger().warning("%s goes on without %s", call, reasons)
    # The retries are the task's: a server that tried again, too, would multiply them.
    async with server.client() as client:
        return await streamed(client, question, model=graph, call=call, proposals=texts, policy={"retries": 0})


def _texts(proposals: Mapping[str, Any]) -> dict[str, str]:
    return {name: said.text for name, said in proposals.items() if isinstance(said, Answer)}
