"""A graph as a LangGraph: a node for each call, and a server that makes the calls.

The state is the conversation, `messages`, and what each agent said, `texts`; the answer is the last message. Agents
that need nothing of each other run at once. A checkpointer keeps what is said, so a run that was killed goes on with
the agents that are missing. `stream_mode="messages"` brings every agent's text as it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from moa_ray.errors import DeadlineExceeded, EngineError, MoARayError, QuorumNotMet, SpecError
from moa_ray.graph import ANSWER, Graph
from moa_ray.integrations.needs import need
from moa_ray.integrations.steps import Step, step_by_step

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import Runnable
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

    from moa_ray.integrations.langchain import ChatMoA

_STATE = ("messages", "texts")


def moa_graph(
    graph: Graph, server: str = "http://127.0.0.1:8000/v1", *, checkpointer: BaseCheckpointSaver | None = None
) -> CompiledStateGraph:
    """A compiled LangGraph of `graph`, which is served at `server`.

    Its answer is that of a whole run; `step_by_step` says what of the policy is lost. The key is the environment's
    `MOA_RAY_API_KEY`.

    Args:
        graph: The graph.
        server: The server's base URL, `/v1` included.
        checkpointer: Where LangGraph keeps a run's state.

    Raises:
        MoARayError: If LangGraph is missing or too old.
        SpecError: If a node of `graph` has a name that the state needs.
    """
    need("langgraph.graph", "langgraph", "1.2", "langgraph")
    from langgraph.graph import END, START, MessagesState, StateGraph

    from moa_ray.integrations.langchain import ChatMoA

    class State(MessagesState):  # type: ignore[misc]
        texts: Annotated[dict[str, str | None], or_]

    steps = _steps(graph)
    model = ChatMoA(server=server, model=graph.spec.name, retries=graph.spec.policy.retries)
    builder = StateGraph(State)
    for step in steps:
        builder.add_node(step.id, ask(model, step.id, step.inputs, spare=_spare(step, steps)))
        builder.add_edge(list(step.inputs) or START, step.id)
    builder.add_edge(ANSWER, END)
    return builder.compile(checkpointer=checkpointer, name=graph.spec.name)


def ask(model: ChatMoA, call: str, shown: Collection[str] = (), *, spare: bool = False) -> Runnable[Any, Any]:
    """A node that makes one call of a graph.

    Args:
        model: The graph.
        call: The call's id; `answer` is the aggregator.
        shown: Ids of the calls whose texts it is shown.
        spare: Whether the others can do without it: an agent that fails is then left out.
    """
    from langchain_core.runnables import RunnableLambda

    def request(state: dict[str, Any]) -> dict[str, Any]:
        texts = {name: text for name in shown if (text := state.get("texts", {}).get(name)) is not None}
        # The retries are the client's: a server that tried again, too, would multiply them.
        return {"input": state["messages"], "call": call, "proposals": texts, "policy": {"retries": 0}}

    def said(message: AIMessage) -> dict[str, Any]:
        return {"messages": [message]} if call == ANSWER else {"texts": {call: str(message.text)}}

    def failed(error: MoARayError) -> dict[str, Any]:
        # Where it is not the agent's failure, such as a server that is away, the run had better be resumed later.
        if not spare or not isinstance(error, EngineError | QuorumNotMet | DeadlineExceeded):
            raise error
        return {"texts": {call: None}}

    def now(state: dict[str, Any]) -> dict[str, Any]:
        try:
            return said(model.invoke(**request(state)))
        except MoARayError as error:
            return failed(error)

    async def later(state: dict[str, Any]) -> dict[str, Any]:
        try:
            return said(await model.ainvoke(**request(state)))
        except MoARayError as error:
            return failed(error)

    return RunnableLambda(now, later, name=call)


def source(graph: Graph, server: str) -> str:
    """A Python file with the LangGraph of `graph`, as a person would write it; it runs as it stands.

    Args:
        graph: The graph.
        server: The server's base URL, `/v1` included.

    Raises:
        SpecError: If a node of `graph` has a name that the state needs.
    """
    steps, lost = _steps(graph), list(step_by_step(graph)[1])
    if graph.spec.nodes:
        lost.append("nodes: LangGraph goes step by step: a node waits for all that run beside those that it is shown")
    name = graph.spec.name
    return _FILE.format(
        name=name,
        lost="\n".join(f"#   {line}" for line in lost),
        model=f"ChatMoA(server={_quoted(server)}, model={_quoted(name)}, retries={graph.spec.policy.retries})",
        nodes="\n".join(_node(step, _spare(step, steps)) for step in steps),
        edges="\n".join(f"builder.add_edge({_before(step)}, {_quoted(step.id)})" for step in steps),
    )


_FILE = '''"""The graph {name} of moa-ray as a LangGraph: python FILE "Why is the sky blue?"

The server's key, where it wants one, is the environment's MOA_RAY_API_KEY.
"""

# What is lost of the graph's policy on the way:
{lost}

import operator
import sys
from typing import Annotated

from langgraph.graph import END, START, MessagesState, StateGraph

from moa_ray.integrations.langchain import ChatMoA
from moa_ray.integrations.langgraph import ask


class State(MessagesState):
    """The conversation, and what each agent said; None is one that failed."""

    texts: Annotated[dict[str, str | None], operator.or_]


model = {model}
builder = StateGraph(State)

{nodes}

{edges}
builder.add_edge("answer", END)

# Compiled with a checkpointer, a run that was killed goes on: graph.invoke(None, config).
graph = builder.compile()

if __name__ == "__main__":
    state = graph.invoke({{"messages": [("user", sys.argv[1])]}})
    print(state["messages"][-1].text)
'''


def _node(step: Step, spare: bool) -> str:
    shown = f", shown={_list(step.inputs)}" if step.inputs else ""
    return f"builder.add_node({_quoted(step.id)}, ask(model, {_quoted(step.id)}{shown}{', spare=True' * spare}))"


def _before(step: Step) -> str:
    return _list(step.inputs) if step.inputs else "START"


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, names))}]"


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isprintable() and not set(text) & set('"\\') else repr(text)


def _steps(graph: Graph) -> tuple[Step, ...]:
    for name in graph.spec.nodes.keys() & set(_STATE):
        hint = "LangGraph wants other names for nodes than for the state's parts; call the node otherwise"
        raise SpecError("a part of the state has this name", key=f"nodes.{name}", hint=hint)
    return step_by_step(graph)[0]


def _spare(step: Step, steps: Sequence[Step]) -> bool:
    """Whether all who are shown what it says can do without it."""
    readers = [each for each in steps if step.id in each.inputs]
    return bool(readers) and all(each.needed < len(each.inputs) and step.id not in each.required for each in readers)
