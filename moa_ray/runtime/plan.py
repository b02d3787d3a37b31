"""What one request asks of a graph: which calls, with which prompts, sampled how. Nothing here waits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf
from typing import Any, Literal

from moa_ray.engines.protocol import Sampling
from moa_ray.errors import RequestError
from moa_ray.graph import RANK, Call, Graph, Message, Policy
from moa_ray.graph.prompts import Prompt
from moa_ray.runtime import limits

_SEEDS = 2**31
"""What every engine takes as a seed lies below."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a reader wants a run.

    Args:
        draft_flush_s: The longest time that text of a proposal may be held back; inf sends no deltas.
        answer_flush_s: The same for the answer; inf says that nothing is looked at before the end.
        answer_only: Whether nothing but the answer is looked at before the end: all else may come along with it.
        agent: Ask this agent alone, in place of the whole graph.
        sampling: What the answer is to be sampled with; None leaves a value to the agent. A seed makes every call
            of the run reproducible.
        extra: Further fields for the answering engine, in OpenAI's words.
        k: Ask only `k` agents of each layer, the first, or those that the gate prefers; a sequence says it layer by
            layer.
        policy: Keys of the graph's policy with other values; see `limits`.
        call: Make this one call of the graph alone, by its id; `answer` is the aggregator, whatever its kind.
        proposals: What that call is shown, by the id of the call that wrote it.
    """

    draft_flush_s: float = inf
    answer_flush_s: float = 0.02
    answer_only: bool = False
    agent: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    extra: Mapping[str, Any] = field(default_factory=dict)
    k: int | tuple[int, ...] | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    call: str | None = None
    proposals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, ready to run. Make it with `of`.

    Args:
        graph: The graph, as small as the request wants it.
        policy: The graph's policy with the request's wishes.
        messages: The conversation.
        options: How the reader wants the run.
        calls: The proposers' calls, inputs before those that see them; none where one agent is asked alone. Of
            those whose text the request brings along, no engine is asked.
        answer: The call that answers or ranks; None for a vote.
        counts: The most agents that answer, layer by layer.
        weights: How much each agent counts, where a gate said so.
    """

    graph: Graph
    policy: Policy
    messages: tuple[Message, ...]
    options: RunOptions
    calls: tuple[Call, ...]
    answer: Call | None
    counts: tuple[int, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, messages: Sequence[Message], options: RunOptions) -> Plan:
        """The plan for one request.

        Raises:
            RequestError: If the options ask for what the graph or its limits do not allow.
        """
        counts = limits.counts_for(graph, options.k)
        if options.k is not None and graph.spec.gate.kind == "all":
            graph = graph.with_layers([agents[:n] for agents, n in zip(graph.spec.layers, counts, strict=True)])
        policy = limits.policy_for(graph, options.policy)
        if options.call is not None or options.proposals:
            if options.agent is not None:
                raise RequestError(
                    f"call: {options.agent} is asked alone, and one call of the graph; either of the two"
                )
            given, answer = limits.step_for(graph, policy.quorum, options.call, options.proposals)
            policy = policy.model_copy(update={"streaming": "barrier"})  # everything is there already
            return cls(graph, policy, tuple(messages), options, given, answer)
        answer = limits.answer_for(graph, options.agent)
        calls = () if options.agent else graph.calls
        return cls(graph, policy, tuple(messages), options, calls, answer, tuple(counts))

    def picked(self, weights: Mapping[str, float]) -> Plan:
        """The same request to the agents that count most, in each layer as many as are wanted.

        A layer's required agents always answer, and all of a layer in which nobody counts.
        """
        names = list(weights)
        layers = []
        for agents, count in zip(self.graph.spec.layers, self.counts, strict=True):
            counting = [agent for agent in agents if weights.get(agent, 0) > 0]
            best = sorted(counting, key=lambda agent: (-weights[agent], names.index(agent)))[:count]
            required = [agent for agent in agents if self.graph.spec.agents[agent].required]
            layers.append([a for a in agents if a in best or a in required] if best else agents)
        graph = self.graph.with_layers(layers)
        return replace(self, graph=graph, calls=graph.calls, answer=graph.answer, weights=weights)

    def alone(self, agent: str) -> Plan:
        """The same request to one agent."""
        return replace(self, calls=(), answer=limits.answer_for(self.graph, agent))

    @property
    def size(self) -> int:
        """Engine calls of the run, where each succeeds at once."""
        return len(self.calls) - len(self.options.proposals) + (self.answer is not None)

    @property
    def finals(self) -> tuple[str, ...]:
        """Ids of the calls whose answers the aggregator sees."""
        if self.answer is not None:
            return self.answer.inputs
        there = {call.id for call in self.calls}
        return tuple(name for name in self.graph.finals if name in there)

    def ranks(self, call: Call) -> bool:
        """Whether `call` names the best proposal, in place of answering."""
        return call is self.answer and call.id == RANK

    def answers(self, call: Call) -> bool:
        """Whether the text of `call` is the run's answer."""
        return call is self.answer and not self.ranks(call)

    def prompt(self, call: Call, proposals: Mapping[str, str]) -> Prompt:
        """What `call` is asked.

        Args:
            call: The call.
            proposals: What it is shown, by the id of the call that wrote it.
        """
        spec = self.graph.spec
        system = spec.agents[call.agent].system
        task: Literal["pick", "synthesize"] = "pick" if self.ranks(call) else "synthesize"
        calls = {call.id: call for call in self.calls}
        weights = self.weights_of([calls[name] for name in proposals])
        return Prompt(system, self.messages, tuple(proposals.values()), spec.prompt, task, weights)

    def weights_of(self, calls: Iterable[Call]) -> tuple[float, ...]:
        """How much the proposal of each call counts; nothing where all count the same."""
        weights = [self.weights.get(call.agent, 0.0) for call in calls]
        return tuple(weight / sum(weights) for weight in weights) if len(set(weights)) > 1 else ()

    def affinity(self, call: Call) -> str:
        """What calls have in common whose prompts begin alike, this turn's and the next one's."""
        opening = next(n for n, message in enumerate(self.messages, start=1) if message["role"] != "system")
        spec = self.graph.spec
        system = "" if spec.prompt == "woven" else spec.agents[call.agent].system  # there it stands at the end
        begin = json.dumps([system, self.messages[:opening]])
        return blake2b(begin.encode(), digest_size=8).hexdigest()

    def sampling(self, call: Call) -> Sampling:
        """How `call` is sampled."""
        agent, wanted = self.graph.spec.agents[call.agent], self.options.sampling
        proposals = [each.id for each in self.graph.calls]
        seed = agent.seed + call.sample - 1 if agent.seed is not None else None
        if wanted.seed is not None:
            seed = (wanted.seed + (proposals.index(call.id) + 1 if call.id in proposals else 0)) % _SEEDS
        sampling = Sampling(agent.temperature, agent.top_p, agent.max_tokens, seed, tuple(agent.stop))
        if agent.max_tokens is None and call.id in proposals:  # cap proposals, never the aggregator
            sampling = replace(sampling, max_tokens=self.graph.spec.proposal_max_tokens)
        if self.answers(call):
            return replace(
                sampling,
                temperature=sampling.temperature if wanted.temperature is None else wanted.temperature,
                top_p=sampling.top_p if wanted.top_p is None else wanted.top_p,
                max_tokens=wanted.max_tokens or sampling.max_tokens,
                stop=wanted.stop or sampling.stop,
            )
        return sampling
