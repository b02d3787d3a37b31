"""The learned gates: all look at an embedding of the last message, with numbers that training left in a file."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from moa_ray.errors import SpecError
from moa_ray.gates.learned.embeddings import Embedder, EmbeddingOptions, checked_width, model_of
from moa_ray.gates.learned.file import GateFile, Watched, read
from moa_ray.gates.learned.outcomes import text_of
from moa_ray.gates.protocol import Choice, Question
from moa_ray.graph import Graph

NOISE = 0.3
"""Standard deviation of the noise on the logits of a gate that runs. With targets of this sharpness, agents whose worth
differs by less than about 0.03 take turns."""


class LearnedOptions(BaseModel):
    """Keys that all learned gates have."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    file: Path
    """What `moa-ray gate train` writes, and the gate reads; a newer version is taken up while it runs. A relative path
    starts at the spec's folder."""
    embeddings: EmbeddingOptions = EmbeddingOptions()
    """Who embeds the questions; not given: all-MiniLM-L6-v2, in the gate's own process."""
    neighbours: PositiveInt = 50
    """Recorded questions, the most similar ones, that tell what agents are worth on a question."""
    cost_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """What an agent that takes all of the panel's tokens loses of its reward; an agent's share counts."""


class NoisyTopKOptions(LearnedOptions):
    """Keys of `gate: {kind: noisy_top_k}`."""

    w_importance: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the loss on CV(importance)^2 in training (eq. 7)."""
    w_load: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the loss on CV(load)^2 in training (eq. 11)."""
    epochs: PositiveInt = 60
    """Times that training goes over the outcomes."""
    learning_rate: PositiveFloat = 0.05
    """Adam's at the beginning; it falls to nothing."""


class Learned(ABC):
    """A `Gate` over embeddings. Make it with `create`."""

    kind: ClassVar[str]
    Options: ClassVar[type[BaseModel]]
    timeout_s: ClassVar[float] = 0.05
    has_model: ClassVar[bool] = True

    def __init__(self, graph: Graph, options: LearnedOptions) -> None:
        self._options = options
        self._file = Watched(path_of(graph, options), self.kind, proposers_of(graph), options.embeddings.model)
        self._embedder = Embedder(model_of(options.embeddings), options.embeddings.batch)

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """A gate that chooses everybody would be no gate, and a file that is here must be for this graph."""
        learned = cast(LearnedOptions, options)
        cls._check(graph)
        if (path := path_of(graph, learned)).exists():  # where a cluster runs, it may be on another node alone
            read(path, cls.kind, proposers_of(graph), learned.embeddings.model)

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> Self:
        """The gate; its embedding model is loaded, its file may still be missing."""
        return cls(graph, cast(LearnedOptions, options))

    async def choose(self, question: Question) -> Choice:
        """Embed the last message, and weigh the agents by it."""
        file = self._file.newest()
        choice = self._choice(file, await self._embedder.one(text_of(question.messages)))
        note = f"{self._file.trouble}; the version before it is used" if self._file.trouble else choice.note
        weights = {agent: choice.weights[agent] for agent in question.agents}
        return Choice(weights, alone=choice.alone, note=note)

    async def close(self) -> None:
        """Give back what the embedder holds."""
        await self._embedder.close()

    @classmethod
    def _check(cls, graph: Graph) -> None:
        if graph.spec.gate.k is None:
            raise SpecError(f"a {cls.kind} gate needs k", hint=f"gate: {{kind: {cls.kind}, k: 2, …}}")

    @abstractmethod
    def _choice(self, file: GateFile, vector: NDArray[np.float32]) -> Choice:
        """What to do with a question with the embedding `vector` (D,)."""


class NoisyTopK(Learned):
    """Shazeer's noisy top-k over a question's embedding (section 2.1, eq. 4).

    A little noise stays when it runs, so that agents that are as good as each other take turns; it is the question's
    own, and the same question always goes to the same agents.
    """

    kind: ClassVar[str] = "noisy_top_k"
    Options: ClassVar[type[BaseModel]] = NoisyTopKOptions

    def _choice(self, file: GateFile, vector: NDArray[np.float32]) -> Choice:
        w_gate_DE = file.arrays["w_gate"]
        (logits_E,) = noisy_logits(checked_width(vector, len(w_gate_DE) - 1)[None], w_gate_DE)
        odds_E = np.exp(logits_E - logits_E.max())
        return _weighing(file, odds_E / odds_E.sum())


def noisy_logits(vectors_ND: NDArray[np.float32], w_gate_DE: NDArray[np.float32]) -> NDArray[np.float32]:
    """H(x) of eq. 4 for N questions, (N, E); the last row of `w_gate`, (D + 1, E), is what counts for all questions."""
    clean_NE = vectors_ND @ w_gate_DE[:-1] + w_gate_DE[-1]
    own = (np.random.default_rng(zlib.crc32(vector.tobytes())) for vector in vectors_ND)
    noise_NE = np.stack([dice.standard_normal(clean_NE.shape[1]) for dice in own])
    noisy_NE: NDArray[np.float32] = (clean_NE + NOISE * noise_NE).astype(np.float32)
    return noisy_NE


class Knn(Learned):
    """What agents' answers to the most similar questions were worth, on average."""

    kind: ClassVar[str] = "knn"
    Options: ClassVar[type[BaseModel]] = LearnedOptions

    def _choice(self, file: GateFile, vector: NDArray[np.float32]) -> Choice:
        return _weighing(file, self._worth(file, vector))

    def _worth(self, file: GateFile, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean worth (E,), or (E + 1,) with the whole panel's, over the neighbours of a question."""
        known_ND, worth_NE = file.arrays["embeddings"], file.arrays["worth"]
        count = min(self._options.neighbours, len(known_ND))
        similarity_N = known_ND @ checked_width(vector, known_ND.shape[1])
        nearest = np.argpartition(-similarity_N, count - 1)[:count]
        mean_E: NDArray[np.float32] = worth_NE[nearest].mean(axis=0)
        return mean_E


class Solo(Knn):
    """The one agent that does as well as the whole panel on the most similar questions, where there is one.

    The panel was judged as a whole; an agent answers alone, without an aggregator, where its answers were worth at
    least as much, less what each costs.
    """

    kind: ClassVar[str] = "solo"

    @classmethod
    def _check(cls, graph: Graph) -> None:
        """Without `k` the whole panel is asked where no agent is as good."""

    def _choice(self, file: GateFile, vector: NDArray[np.float32]) -> Choice:
        *agents, panel = self._worth(file, vector).tolist()
        best = int(np.argmax(agents))
        choice = _weighing(file, np.array(agents, np.float32))
        note = f"alone {file.agents[best]} is worth {agents[best]:.2f}, the panel {panel:.2f}"
        return Choice(choice.weights, alone=file.agents[best] if agents[best] >= panel else "", note=note)


def _weighing(file: GateFile, worth_E: NDArray[np.float32]) -> Choice:
    """Worth as weights: more than 0 in the same order, also where agents cost more than they bring."""
    weights_E = worth_E - min(worth_E.min(), 0.0) + 1e-6
    return Choice(dict(zip(file.agents, weights_E.tolist(), strict=True)))


def proposers_of(graph: Graph) -> tuple[str, ...]:
    """The agents that a gate of `graph` chooses among, in order."""
    return tuple(dict.fromkeys(call.agent for call in graph.calls))


def path_of(graph: Graph, options: LearnedOptions) -> Path:
    """Where the gate's file lies."""
    return Path(graph.source.folder, options.file.expanduser())
