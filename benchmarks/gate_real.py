"""A gate that learns from real models' answers: SmolLM2 135M and a larger model, which of them to ask for GSM8K.

Both answer all questions; half of them are the recorded outcomes (right or not), the rest is held out. Run:
`python -m benchmarks.gate_real DATA LARGER.gguf [QUESTIONS]`, DATA a folder with `gsm8k_test.jsonl`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moa_ray.engines import Engine, EngineRequest, Sampling, registry
from moa_ray.gates import Question
from moa_ray.gates import registry as gates
from moa_ray.gates.learned.train import train
from moa_ray.graph import Graph, from_dict

_AT_ONCE = 4
_MOST_TOKENS = 200
_SYSTEM = "Solve the problem in a few short steps. End with the number alone after ####."


def pool(larger: str, file: Path, kind: str, cost_weight: float) -> Graph:
    """Both models as agents of a layer, and a gate that picks one."""
    engine = {"kind": "llamacpp", "resources": {"num_cpus": 2}, "slots": _AT_ONCE, "context_window": 2048 * _AT_ONCE}
    return from_dict(
        {
            "version": 1,
            "name": "real",
            "engines": {"small": {**engine, "model": "smollm2-135m-instruct"}, "large": {**engine, "model": larger}},
            "agents": {"small": {"engine": "small"}, "large": {"engine": "large"}},
            "layers": [["small", "large"]],
            "aggregator": {"vote": {"extract": "number"}},
            "gate": {"kind": kind, "k": 1, "file": str(file), "cost_weight": cost_weight},
        }
    )


async def answers(engine: Engine, asked: Sequence[dict[str, str]]) -> tuple[list[float], list[int]]:
    """Whether each question was answered right, and tokens of each answer."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(question: dict[str, str]) -> tuple[float, int]:
        messages = ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": question["question"]})
        async with places:
            chunks = [
                c async for c in engine.stream(EngineRequest("bench", messages, Sampling(0.0, 1.0, _MOST_TOKENS)))
            ]
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", "".join(chunk.text for chunk in chunks))
        wanted = question["answer"].rpartition("####")[2].strip().replace(",", "")
        usage = chunks[-1].usage
        assert usage is not None
        right = bool(numbers) and float(numbers[-1].replace(",", "")) == float(wanted)
        return float(right), usage.prompt_tokens + usage.completion_tokens

    found = await asyncio.gather(*map(ask, asked))
    return [right for right, _ in found], [tokens for _, tokens in found]


async def run(data: Path, larger: str, count: int) -> None:
    """Ask, train, and choose for questions that nobody trained on."""
    lines = (data / "gsm8k_test.jsonl").read_text().splitlines()[:count]
    asked = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        file, outcomes = Path(folder, "gate"), Path(folder, "outcomes")
        graph = pool(larger, file, "knn", 0.0)
        right: dict[str, list[float]] = {}
        tokens: dict[str, list[int]] = {}
        for name, spec in graph.engines.items():
            engine = await registry.create(spec)
            right[name], tokens[name] = await answers(engine, asked)
            await engine.close()
        half = count // 2
        with outcomes.open("w") as out:
            for number, question in enumerate(asked[:half]):
                line = {
                    "prompt": question["question"],
                    "rewards": {name: right[name][number] for name in right},
                    "tokens": {name: tokens[name][number] for name in right},
                }
                out.write(json.dumps(line) + "\n")
        print(f"{count} questions of GSM8K, {half} of them recorded; of the others, answered right:")
        for name in right:
            print(f"  {name} alone: {np.mean(right[name][half:]):.1%}, {np.mean(tokens[name][half:]):.0f} tokens")
        for kind in ("noisy_top_k", "knn"):
            graph = pool(larger, file, kind, 0.0)
            (await train(graph, outcomes)).gate.write(file)
            gate = gates.create(graph)
            scores, spent = [], []
            for number, question in enumerate(asked[half:], start=half):
                choice = await gate.choose(Question(({"role": "user", "content": question["question"]},), tuple(right)))
                best = max(choice.weights, key=lambda name: choice.weights[name])
                scores.append(right[best][number])
                spent.append(tokens[best][number])
            await gate.close()
            both = np.mean([sum(tokens[name][n] for name in right) for n in range(half, count)])
            print(f"  {kind}: {np.mean(scores):.1%} with {np.mean(spent) / both:.0%} of both models' tokens")


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100))
