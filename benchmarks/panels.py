"""Is a panel worth it? Qwen2.5-Coder-0.5B and SmolLM2-135M on GSM8K, through the served path.

`python -m benchmarks.panels DATA QWEN.gguf [QUESTIONS [CACHE]]`, DATA a folder with `gsm8k_test.jsonl`. One agent
alone, eight samples of it voted on and synthesised (Self-MoA), and four of each model. An evaluation that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moa_ray.evaluate import report, tasks
from moa_ray.evaluate.served import serving
from moa_ray.evaluate.study import Study, carry_out
from moa_ray.graph import Graph, Message, from_dict

_SYSTEM = "Solve the problem step by step, one short calculation at a time. End with: The answer is NUMBER."
_EXAMPLES = (
    (
        "Tom reads 20 pages a day on 4 days and half as many a day on the next 2 days. How many pages does he read?",
        "First days: 4 * 20 = 80. Pages a day after: 20 / 2 = 10. Next days: 2 * 10 = 20. Together: 80 + 20 = 100. "
        "The answer is 100.",
    ),
    (
        "A coat costs $80. It is sold at 25% off, and a customer pays with a $100 note. How many dollars of change "
        "does she get?",
        "Discount: 80 * 0.25 = 20. Price: 80 - 20 = 60. Change: 100 - 60 = 40. The answer is 40.",
    ),
)
"""Solved problems before the question (few-shot), so that solutions end in a hundred tokens and not in five."""
_ENGINE = {"kind": "llamacpp", "slots": 8, "threads": 2, "context_window": 4096}
_SAMPLES = 8
_DRAFTS = 4
"""Samples that are synthesised: reading eight would have taken twice the time."""
_MOST_TOKENS = 200


def graphs(larger: str) -> list[Graph]:
    """The vote, the synthesis, and both again with proposals of two models."""
    engines = {"qwen": {**_ENGINE, "model": larger}, "smol": {**_ENGINE, "model": "smollm2-135m-instruct"}}
    sampled = {"system": _SYSTEM, "temperature": 0.5, "max_tokens": _MOST_TOKENS}
    chief = {"engine": "qwen", "system": _SYSTEM, "temperature": 0, "max_tokens": _MOST_TOKENS}

    def graph(name: str, samples: dict[str, int], aggregator: Any) -> Graph:
        agents: dict[str, Any] = {model: {"engine": model, **sampled, "samples": n} for model, n in samples.items()}
        if aggregator == "chief":
            agents["chief"] = chief
        return from_dict(
            {
                "version": 1,
                "name": name,
                "engines": {model: engines[model] for model in samples},  # the chief is on one of them
                "agents": agents,
                "layers": [list(samples)],
                "aggregator": aggregator,
                "policy": {"deadline_s": 3600},
            }
        )

    vote = {"vote": {"extract": "number"}}
    return [
        graph("self-moa-vote", {"qwen": _SAMPLES}, vote),
        graph("mixed-vote", {"qwen": _SAMPLES // 2, "smol": _SAMPLES // 2}, vote),
        graph("self-moa-synthesize", {"qwen": _DRAFTS}, "chief"),
        graph("mixed-synthesize", {"qwen": _DRAFTS // 2, "smol": _DRAFTS // 2}, "chief"),
    ]


def with_examples(item: tasks.Item) -> tasks.Item:
    """A question after the solved problems."""
    shown: list[Message] = []
    for question, solution in _EXAMPLES:
        shown += [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return replace(item, messages=(*shown, *item.messages))


async def main(data: Path, larger: str, count: int, cache: Path) -> None:
    """Evaluate, and print the report."""
    task = tasks.load(str(data / "gsm8k_test.jsonl"), limit=count)
    task = replace(task, items=tuple(map(with_examples, task.items)))
    study = Study(task, graphs(larger), equal_budget=False)
    with serving([arm.graph for arm in study.arms()], cache) as served:
        results = await carry_out(study, served, concurrency=4, progress=_print)
    print(report.text(report.rendered(results)))


def _print(name: str, done: int, of: int) -> None:
    if done % 10 == 0 or done == of:
        print(json.dumps({"arm": name, "done": done, "of": of}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[4]) if len(sys.argv) > 4 else Path("panels-cache")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 200, place))
