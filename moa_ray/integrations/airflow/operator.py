"""A question to a graph, or one call of a graph, as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from moa_ray.client import Finished
from moa_ray.errors import MoARayError
from moa_ray.graph import ANSWER
from moa_ray.integrations.airflow.hook import MoAHook
from moa_ray.integrations.airflow.trigger import MoATrigger

Proposals = Mapping[str, str] | Sequence["Proposals"] | None


class MoAOperator(BaseOperator):  # type: ignore[misc]
    """Asks a moa-ray server.

    Its result is the answer's text; of a proposer's call it is `{call: text}`, which is what `proposals` takes.
    An error that no retry can save fails the task at once. `execution_timeout` holds while it is deferred, too.

    Args:
        question: The user's question.
        model: A graph, or `graph/agent`; the server's first where not given.
        call: Make this one call of the graph alone, by its id; `answer` is the aggregator.
        proposals: What that call is shown, by the id of the call that wrote it: a mapping, or the outputs of the
            tasks that wrote them. What failed is not shown; the server refuses where that breaks the quorum.
        deferrable: Whether to wait in the triggerer, and hold no worker slot.
        conn_id: A connection of type `moa_ray`.
        server: The server's base URL in its place; the key comes from the environment variable MOA_RAY_API_KEY.
        **kwargs: What every operator of Airflow takes.
    """

    template_fields: ClassVar[Sequence[str]] = ("question", "model", "call", "proposals", "conn_id", "server")
    ui_color = "#e8f1fb"

    def __init__(
        self,
        *,
        question: str,
        model: str | None = None,
        call: str | None = None,
        proposals: Proposals = None,
        deferrable: bool = True,
        conn_id: str = MoAHook.default_conn_name,
        server: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.question = question
        self.model = model
        self.call = call
        self.proposals = proposals
        self.deferrable = deferrable
        self.conn_id = conn_id
        self.server = server

    def execute(self, context: Any) -> Any:
        """Ask, here or in the triggerer.

        Raises:
            AirflowFailException: What the server met, where no retry can save it.
            AirflowException: Where one may.
        """
        asked: dict[str, Any] = {"model": self.model}
        if self.call or self.proposals:
            # The retries are the task's: a server that tried again, too, would multiply them.
            asked |= {"call": self.call, "proposals": gathered(self.proposals), "policy": {"retries": 0}}
        if self.deferrable:
            trigger = MoATrigger(self.question, asked, self.conn_id, self.server)
            self.defer(trigger=trigger, method_name="execute_complete", timeout=self.execution_timeout)
        try:
            with MoAHook(self.conn_id, self.server).get_conn() as client:
                *_, last = client.stream(self.question, **asked)
        except MoARayError as error:
            raise _failure(str(error), error.retryable) from error
        assert isinstance(last, Finished)
        return self._result(last.answer.text)

    def execute_complete(self, context: Any, event: Mapping[str, Any]) -> Any:
        """What becomes of a trigger's event: the result, or the error. Raises as `execute` does."""
        if "error" in event:
            raise _failure(event["error"], event["retryable"])
        return self._result(event["text"])

    def _result(self, text: str) -> str | dict[str, str]:
        return text if self.call in (None, ANSWER) else {self.call: text}


def gathered(proposals: Proposals) -> dict[str, str]:
    """Proposals as one mapping: what a mapped task left is a sequence of them, and what failed left none."""
    if isinstance(proposals, Mapping):
        return dict(proposals)
    if isinstance(proposals, str):
        raise AirflowFailException(
            f"a proposal comes with its call, as {{call: text}}, and not alone: {proposals[:80]!r}"
        )
    # A slice, since Airflow logs an error at the end of each sequence of results that is read one by one.
    return {call: text for each in (proposals or ())[:] for call, text in gathered(each).items()}


def _failure(message: str, retryable: bool) -> AirflowException:
    return AirflowException(message) if retryable else AirflowFailException(message)
