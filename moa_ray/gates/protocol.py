"""What a gate is to the rest of moa-ray: something that looks at a conversation and says who should answer it.

The runtime knows gates through `Gate` alone. A gate gives every agent a weight; who of a layer answers, its top k, the
runtime decides, as a gate of experts does for a token (Shazeer et al. 2017, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from moa_ray.graph.messages import Message


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent said to a gate.

    Args:
        call: Id of the call, by which the ledger knows it.
        text: The whole text.
        logprob: Mean log-probability of its tokens, where the engine tells it.
    """

    call: str
    text: str
    logprob: float | None = None


class Ask(Protocol):
    """Asks agents of the graph on a gate's behalf; calls and tokens are the request's, and in its ledger."""

    async def __call__(
        self, agent: str, messages: tuple[Message, ...], *, samples: int = 1, logprobs: bool = False
    ) -> list[Answer]:
        """`samples` answers of `agent` to `messages`, after its own instructions, with their log-probabilities or not.

        Raises:
            MoARayError: If it does not answer, after all retries.
        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """What a gate sees.

    Args:
        messages: The conversation; the last message is to be answered.
        agents: Who may be chosen: the proposers, each once, in the user's order.
        ask: A way to ask any agent of the graph; not there for a gate that has a process of its own.
        wants: Further fields of the request that the answering engine is to be given, such as `tools`.
    """

    messages: tuple[Message, ...]
    agents: tuple[str, ...]
    ask: Ask | None = None
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """What a gate says.

    Args:
        weights: How much each agent counts, at least 0; one that is missing or 0 is not asked.
        alone: The agent that answers alone, without a panel and without an aggregator; "" for the panel.
        answer: The answer, where the gate has got it already; nobody else is asked.
        note: What a reader should know of how this came about.
    """

    weights: Mapping[str, float]
    alone: str = ""
    answer: Answer | None = None
    note: str = ""


class Gate(Protocol):
    """Says who answers. One gate serves all requests of a router at once."""

    async def choose(self, question: Question, /) -> Choice:
        """Weigh the agents for one question.

        A gate that raises, or takes longer than its `timeout_s`, is left out: then everybody answers.
        """
        ...

    async def close(self) -> None:
        """Give back what the gate holds. Safe to call twice."""
        ...
