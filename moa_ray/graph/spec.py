"""The YAML that a user writes, as pydantic models.

What each key means stands in its description, which is also what `moa-ray schema` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"

ANSWER, RANK = "answer", "rank"
"""Ids of the aggregator's own call."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""Letters, digits, `.`, `_`, `-`: it becomes part of a Ray actor's name and of a model id."""


def _branch(value: Any) -> str:
    """Which member of a union is meant: told by the form of what stands there, so that errors speak of that one."""
    return "<mapping>" if isinstance(value, Mapping | BaseModel) else "<plain>"


def _aggregator(value: Any) -> str:
    """The same for an aggregator."""
    keys = value.keys() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).keys()
    return "<kind>" if "kind" in keys else "<rank>" if "rank" in keys else _branch(value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class _OfAKind(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the kind."""
        return dict(self.model_extra or {})


class Resources(_Strict):
    """What each replica of an engine takes from the Ray cluster."""

    num_cpus: float | None = Field(None, ge=0)
    """Logical CPUs; the engine kind's own default where not given."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs; a fraction shares one GPU."""
    accelerator_type: str | None = None
    """Only on nodes with this accelerator, such as `A100`, `H100`, `L4`."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources."""


class Autoscaling(_Strict):
    """Replicas that follow the load."""

    min: int = Field(1, ge=0)
    """Fewest replicas; 0 lets an idle engine give back its GPU."""
    max: PositiveInt
    """Most replicas."""
    target_ongoing_requests: PositiveFloat = 2.0
    """Calls in flight per replica that the autoscaler aims at."""
    upscale_delay_s: NonNegativeFloat = 30.0
    """Seconds that the load asks for more replicas before there are more."""
    downscale_delay_s: NonNegativeFloat = 600.0
    """Seconds that the load asks for fewer replicas before there are fewer."""


class Price(_Strict):
    """What an engine's tokens cost, in dollars a million."""

    prompt: float = Field(ge=0)
    """Tokens of the prompt."""
    completion: float = Field(ge=0)
    """Tokens of the completion."""
    cached: float | None = Field(None, ge=0)
    """Tokens of the prompt that needed no prefill; as those of the prompt where not given."""


class EngineSpec(_OfAKind):
    """Where tokens come from. Keys beside these are options of the engine's kind."""

    kind: str
    """`llamacpp`, `openai`, `scripted`, or a kind that a plug-in brings."""
    model: str
    """A path, a Hugging Face id, a catalogue name (`moa-ray models list`), or an endpoint's model id."""
    resources: Resources = Resources()
    """What each replica takes from the cluster."""
    replicas: Annotated[
        Annotated[PositiveInt, Tag("<plain>")] | Annotated[Autoscaling, Tag("<mapping>")], Discriminator(_branch)
    ] = 1
    """Number of replicas (Ray actors), or `{min, max, target_ongoing_requests, …}`."""
    max_ongoing_requests: PositiveInt = 64
    """Calls that one replica holds at once; more wait in the router."""
    price: Price | None = None
    """What its tokens cost; not given: nothing is said of dollars."""

    @property
    def least_replicas(self) -> int:
        """Replicas that there always are."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    @property
    def most_replicas(self) -> int:
        """Replicas that there can be."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max


class Agent(_Strict):
    """A persona on an engine."""

    engine: Annotated[Annotated[str, Tag("<plain>")] | Annotated[EngineSpec, Tag("<mapping>")], Discriminator(_branch)]
    """A name from `engines`, or an engine of the agent's own, which gets its own actor."""
    system: str = ""
    """The agent's own instructions."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature; 0 is greedy, not given leaves it to the engine."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling."""
    max_tokens: PositiveInt | None = None
    """Most completion tokens. A proposer without it gets `proposal_max_tokens`; an aggregator is not capped."""
    seed: int | None = None
    """Seed of the sampling; sample number n uses seed + n - 1."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end the answer."""
    samples: PositiveInt = 1
    """Independent answers that this agent gives (Self-MoA, Li et al. 2025)."""
    timeout_s: PositiveFloat | None = None
    """Longest time for one call, in seconds."""
    fallbacks: list[str] = Field(default_factory=list)
    """Engines that are asked instead, in this order, when the agent's own fails or is known to be down."""
    required: bool = False
    """Whether a layer may not be done without this agent's answer, whatever its quorum."""
    patience_s: float | None = Field(None, ge=0)
    """Seconds that a layer waits for this agent once its quorum is met, in place of `policy.grace_s`."""


class Node(_Strict):
    """One step of a graph that is not layered."""

    agent: str
    """Who answers, a name from `agents`."""
    inputs: list[str] = Field(default_factory=list)
    """Nodes whose answers this one sees; none for a first node."""


class Vote(_Strict):
    """Take the answer that most proposals give (self-consistency, Wang et al. 2022)."""

    extract: Literal["number", "choice", "last_line", "regex"] = "number"
    """How the answer is found in a proposal: its last number, its last A-Z choice letter, its last line,
    or the first group of `pattern`."""
    pattern: str | None = None
    """The regular expression for `extract: regex`; its last match counts."""


class Rank(_Strict):
    """Let one agent pick the best proposal (the paper's LLM-ranker baseline, section 3.3)."""

    agent: str
    """The judge, a name from `agents`."""


class VoteAggregator(_Strict):
    vote: Vote


class RankAggregator(_Strict):
    rank: Rank


class PluginAggregator(_OfAKind):
    """An aggregator that a plug-in brings. Keys beside this one are options of its kind."""

    kind: str
    """Its name."""


class Gate(_OfAKind):
    """Who of a layer answers. Keys beside these are options of the gate's kind."""

    kind: str = "all"
    """`all`, `random`, `rules`, `llm`, `cascade`, `noisy_top_k`, `knn`, `solo`, or a kind that a plug-in brings."""
    k: PositiveInt | None = None
    """Agents of each layer that answer, those with the highest weights; not given: all that have a weight."""
    agent: str | None = None
    """The agent that picks (`llm`), or that is asked before the panel (`cascade`)."""
    timeout_s: PositiveFloat | None = None
    """Longest time for the gate, in seconds; then everybody answers. Not given: 0.05, or 60 where it asks agents."""
    explore: float = Field(0.0, ge=0, le=1)
    """Share of the requests that try agents drawn at random, `k` of each layer, so that the gate can learn of them."""


class Hedge(_Strict):
    """Asking a second replica when the first one is slow to begin; the first to begin answers, the other is cut off."""

    after: Literal["p90", "p95", "p99"] = "p95"
    """How slow: beyond this percentile of the engine's recent times to first token."""
    budget: float = Field(0.1, gt=0, le=1)
    """Most calls that may be asked twice, as a share of all."""


class EarlyExit(_Strict):
    """When proposals agree, nobody else needs to be asked."""

    measure: str = "exact"
    """How their agreement is measured: `exact`, `words`, or what a plug-in brings."""
    threshold: float = Field(1.0, gt=0, le=1)
    """The agreement, from 0 to 1, that is enough."""
    proposals: int = Field(2, ge=2)
    """Fewest proposals that must be there."""


class Policy(_Strict):
    """What a request may cost and what it survives."""

    quorum: PositiveInt = 1
    """Agents of a layer that must answer; below it the request fails with their reasons."""
    grace_s: float | None = Field(None, ge=0)
    """Seconds that a layer waits for the rest once its quorum is met; not given waits for all."""
    deadline_s: PositiveFloat = 600.0
    """Longest time for a whole request, in seconds."""
    layer_deadline_s: PositiveFloat | None = None
    """Longest time for a layer of proposers, in seconds; who has not answered by then counts as failed."""
    retries: int = Field(1, ge=0, le=10)
    """Times that a failed call is tried again; an answer that broke off is continued, never repeated."""
    hedge: Hedge | None = None
    """`{after: p95}`: ask a second replica where the first is slower to begin than usual; not given: never."""
    streaming: Literal["barrier", "overlap", "staircase"] = "barrier"
    """`barrier`: a layer starts when the one before is done, as in the paper. `overlap`: the same, and the same text,
    but prompts are prefilled while the proposals in them are being written. `staircase`: a layer starts on the first
    chunks of the one before and takes in newer text as it writes."""
    chunk_tokens: PositiveInt = 64
    """`staircase`: tokens that a layer wants of the one before it to start, and writes before it looks for more."""
    patience: float = Field(0.0, ge=0, le=1)
    """`staircase`: how much of each proposal must be there before the answer begins, as a share of the most that it
    may become: 0 is eager, a chunk is enough; 1 is patient, the answer waits for the proposals' end."""
    early_exit: EarlyExit | None = None
    """`{measure: exact, threshold: 1, proposals: 2}`: once proposals agree, the rest of their layer is cut off, and
    layers of proposers to come are skipped; not given: never."""


class Limits(_Strict):
    """How far a request may go beyond the policy."""

    deadline_s: PositiveFloat | None = None
    """Longest deadline that a request may ask for; not given: the policy's."""
    retries: int | None = Field(None, ge=0, le=10)
    """Most retries that a request may ask for; not given: the policy's."""


class GraphSpec(_Strict):
    """A Mixture-of-Agents graph."""

    version: Literal[1]
    """Version of this format."""
    name: Name
    """Name of the graph: its Ray Serve application and its model id."""
    description: str = ""
    """One line for people."""
    engines: dict[Name, EngineSpec] = Field(default_factory=dict)
    """Engines by name, a Ray Serve deployment each."""
    agents: dict[Name, Agent] = Field(min_length=1)
    """Agents by name."""
    layers: list[Annotated[list[str], Field(min_length=1)]] = Field(default_factory=list)
    """Proposers, layer by layer; every agent of a layer sees all answers of the layer before."""
    nodes: dict[Name, Node] = Field(default_factory=dict)
    """In place of `layers`: a free graph, each node with its own `inputs`."""
    aggregator: Annotated[
        Annotated[str, Tag("<plain>")]
        | Annotated[VoteAggregator, Tag("<mapping>")]
        | Annotated[RankAggregator, Tag("<rank>")]
        | Annotated[PluginAggregator, Tag("<kind>")],
        Discriminator(_aggregator),
    ]
    """Who makes the answer: an agent that synthesises, `{vote: …}`, `{rank: {agent: …}}`, or `{kind: …}`, which a
    plug-in brings."""
    gate: Gate = Gate()
    """Who of a layer answers."""
    policy: Policy = Policy()
    """What a request may cost and what it survives."""
    limits: Limits = Limits()
    """How far a request may go beyond the policy."""
    prompt: Literal["stable", "woven", "paper"] = "stable"
    """Where the proposals stand. `stable`: after the conversation, so that prefixes stay cached; `woven`: there, too,
    but a part of each in turn, so that even proposals written at the same time only ever add to the prompt's end, and
    the agent's own instructions last, so that agents of one engine share all before them;
    `paper`: in the system message before it, as the reference implementation has it."""
    proposal_max_tokens: PositiveInt = 600
    """Cap of a proposer that sets no `max_tokens`."""
