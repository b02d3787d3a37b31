"""Training of learned gates from recorded outcomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.nn import functional as F

from moa_ray.errors import SpecError
from moa_ray.gates.learned import outcomes
from moa_ray.gates.learned.embeddings import Embedder, model_of
from moa_ray.gates.learned.file import GateFile
from moa_ray.gates.learned.kinds import (
    NOISE,
    Knn,
    LearnedOptions,
    NoisyTopK,
    NoisyTopKOptions,
    Solo,
    noisy_logits,
    path_of,
    proposers_of,
)
from moa_ray.gates.learned.worth import around, settled
from moa_ray.gating import NoisyTopK as TokenGate
from moa_ray.graph import Graph

_SHARPNESS = 0.1
"""Temperature of the targets: an agent that is worth so much less than another one is wanted e times less often."""
_LEAST_NOISE = math.log(math.expm1(NOISE))
"""Softplus of this is the noise's standard deviation in the end. The paper's gate learns its noise; here it falls from
log 2 to what the gate has when it runs, since that is when the load is to be balanced."""
_BATCH = 256
_MOST_COST_WEIGHT = 16.0


@dataclass(frozen=True, slots=True)
class Trained:
    """A gate, and how well it does on its own outcomes.

    Args:
        gate: What to write.
        path: Where its graph wants it.
        questions: Outcomes that it was trained on.
        has_best: Share of the questions for which an agent that it chooses had the best recorded reward. `knn` and
            `solo` are judged by a question's neighbours without itself.
        load: Share of the questions that each agent gets, by name.
        cost: Tokens that its choices take over the whole panel's.
        cost_weight: What it was trained with: the graph's, or the one that keeps to the budget.
    """

    gate: GateFile
    path: Path
    questions: int
    has_best: float
    load: dict[str, float]
    cost: float
    cost_weight: float


async def train(graph: Graph, path: Path, *, budget: float | None = None, seed: int = 0) -> Trained:
    """Train the gate of `graph` on the outcomes in `path`.

    Args:
        graph: The graph.
        path: The outcomes, see `outcomes`.
        budget: The most tokens that it may choose, as a share of the whole panel's; `cost_weight` is then the least
            that keeps to it, as RouteLLM calibrates its threshold (Ong et al. 2024).
        seed: Of `noisy_top_k`.

    Raises:
        SpecError: If the graph has no learned gate, the outcomes do not fit it, or no choice keeps to the budget.
        EngineUnavailable: If they cannot be embedded.
    """
    options = _options(graph)
    agents = proposers_of(graph)
    known = outcomes.load(path, agents, with_panel=graph.spec.gate.kind == Solo.kind)
    embedder = Embedder(model_of(options.embeddings), options.embeddings.batch)
    try:
        vectors_ND = await embedder.many(known.questions)
    finally:
        await embedder.close()
    rewards_NE = settled(known, vectors_ND, options.neighbours)
    fitting = _Fitting(graph, options, agents, known, vectors_ND, rewards_NE, seed)
    return fitting.trained(options.cost_weight) if budget is None else fitting.within(budget)


def _options(graph: Graph) -> LearnedOptions:
    kinds: dict[str, type[LearnedOptions]] = {
        NoisyTopK.kind: NoisyTopKOptions,
        Knn.kind: LearnedOptions,
        Solo.kind: LearnedOptions,
    }
    spec = graph.spec.gate
    if spec.kind not in kinds:
        hint = f"gate: {{kind: {next(iter(kinds))}, …}}"
        raise SpecError(f"a gate of the kind {spec.kind!r} learns nothing", hint=hint)
    try:
        return kinds[spec.kind].model_validate(spec.options)
    except ValidationError as error:
        raise graph.source.invalid(("gate",), error, kinds[spec.kind]) from None


@dataclass(frozen=True, slots=True)
class _Fitting:
    """What all gates that are tried for one budget have in common."""

    graph: Graph
    options: LearnedOptions
    agents: tuple[str, ...]
    known: outcomes.Outcomes
    vectors_ND: NDArray[np.float32]
    rewards_NE: NDArray[np.float32]
    seed: int

    def within(self, budget: float) -> Trained:
        """The gate with the least weight of cost that keeps to `budget`, to a hundredth."""
        low, high = 0.0, _MOST_COST_WEIGHT
        best = self.trained(high)
        if best.cost > budget:
            raise SpecError(
                f"the cheapest choice takes {best.cost:.0%} of the panel's tokens, more than the {budget:.0%} allowed",
                hint="lower the gate's k",
            )
        if (free := self.trained(low)).cost <= budget:
            return free
        while high - low > 0.01:
            trial = self.trained((low + high) / 2)
            if trial.cost <= budget:
                best, high = trial, trial.cost_weight
            else:
                low = trial.cost_weight
        return best

    def trained(self, cost_weight: float) -> Trained:
        """The gate with `cost_weight`."""
        kind, count = self.graph.spec.gate.kind, len(self.agents)
        k = min(self.graph.spec.gate.k or count, count)
        worth_NE = (self.rewards_NE - cost_weight * self.known.tokens / self.known.tokens[-1]).astype(np.float32)
        scores_NE = around(self.vectors_ND, worth_NE, self.options.neighbours)
        if isinstance(self.options, NoisyTopKOptions):
            arrays = {"w_gate": fit(self.vectors_ND, scores_NE[:, :-1], k, self.options, self.seed)}
            scores_NE = noisy_logits(self.vectors_ND, arrays["w_gate"])
        else:
            arrays = {"embeddings": self.vectors_ND, "worth": worth_NE if kind == Solo.kind else worth_NE[:, :-1]}
        alone_N = np.zeros(len(scores_NE), bool)
        if kind == Solo.kind:
            alone_N = scores_NE[:, :-1].max(axis=1) >= scores_NE[:, -1]
        scores_NE = scores_NE[:, :count]
        chosen_NE = np.where(alone_N[:, None], _top(scores_NE, 1), _top(scores_NE, k))
        gate = GateFile(kind, self.agents, self.options.embeddings.model, arrays)
        load = dict(zip(self.agents, chosen_NE.mean(axis=0).tolist(), strict=True))
        has_best, cost = _has_best(self.known, chosen_NE), _cost(self.known, chosen_NE, alone_N)
        return Trained(gate, path_of(self.graph, self.options), len(chosen_NE), has_best, load, cost, cost_weight)


def _top(scores_NE: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Who is among the top k of each row."""
    best_NE = np.zeros(scores_NE.shape, bool)
    np.put_along_axis(best_NE, np.argsort(-scores_NE, axis=1)[:, :k], True, axis=1)
    return best_NE


def _has_best(known: outcomes.Outcomes, chosen_NE: NDArray[np.bool_]) -> float:
    """Share of the questions, of those with a chosen agent that was judged, whose best reward such an agent has."""
    rewards_NE = np.nan_to_num(known.rewards[:, :-1], nan=-1.0)
    of_chosen_N = np.where(chosen_NE, rewards_NE, -1.0).max(axis=1)
    looked_at = of_chosen_N >= 0
    return float((of_chosen_N >= rewards_NE.max(axis=1))[looked_at].mean()) if looked_at.any() else 0.0


def _cost(known: outcomes.Outcomes, chosen_NE: NDArray[np.bool_], alone_N: NDArray[np.bool_]) -> float:
    """Mean tokens of a question over the panel's, the aggregator's included where somebody combines."""
    *agents, panel = known.tokens.tolist()
    combining = max(panel - sum(agents), 0.0)
    return float((chosen_NE @ np.array(agents) + np.where(alone_N, 0.0, combining)).mean() / panel)


def with_ones(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """A column of ones at the end, for what agents are worth whatever the question."""
    return np.concatenate([vectors_ND, np.ones((len(vectors_ND), 1), np.float32)], axis=1)


def fit(
    vectors_ND: NDArray[np.float32], worth_NE: NDArray[np.float32], k: int, options: NoisyTopKOptions, seed: int
) -> NDArray[np.float32]:
    """W_g of a noisy top-k gate, (D + 1, E); the last row is for the column of ones.

    The loss is what the gate's choice costs, the negative mean of sum_i G(x)_i worth_i (eq. 1 with scores in place of
    outputs), its clean logits' distance to the worth of all agents, and the losses on importance and load.
    """
    torch.manual_seed(seed)
    x_ND, worth = torch.from_numpy(with_ones(vectors_ND)), torch.from_numpy(worth_NE)
    gate = TokenGate(worth.shape[1], k, d_model=x_ND.shape[1], w_importance=options.w_importance, w_load=options.w_load)
    wanted_NE = (worth / _SHARPNESS).softmax(dim=1)
    optimizer = torch.optim.Adam([gate.w_gate_DE], lr=options.learning_rate)
    gate.train()
    slowing = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.epochs)
    for epoch in range(options.epochs):
        with torch.no_grad():
            gate.w_noise_DE.zero_()
            gate.w_noise_DE[-1] = _LEAST_NOISE * epoch / options.epochs
        for rows in torch.randperm(len(x_ND)).split(_BATCH):
            routing = gate(x_ND[rows])
            gained = (routing.weights_TK * worth[rows].gather(1, routing.experts_TK)).sum(dim=1).mean()
            apart = F.cross_entropy(x_ND[rows] @ gate.w_gate_DE, wanted_NE[rows])
            loss = apart - gained + sum(routing.losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        slowing.step()
    fitted: NDArray[np.float32] = gate.w_gate_DE.detach().numpy()
    return fitted
