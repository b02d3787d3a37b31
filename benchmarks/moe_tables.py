"""The shape of tables 6 and 7 of Shazeer et al. 2017 on a small corpus.

    python benchmarks/moe_tables.py run  --corpus /usr/share/dictd/gcide.dict.dz --results runs/tables.jsonl
    python benchmarks/moe_tables.py show --results runs/tables.jsonl --plots benchmarks/plots

`run` trains every model with every seed, one after the other and on one thread, and appends a
JSON line for each; runs that are already there are skipped. `show` prints both tables as
Markdown and draws the plots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from moa_ray.moe.config import TrainConfig
from moa_ray.moe.model import count_parameters
from moa_ray.moe.report import read_log
from moa_ray.moe.train import Trainer, load_corpus

SEEDS = (0, 1, 2)
D_MODEL, D_HIDDEN, K, STEPS = 32, 64, 4, 2000
LOSSES = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1))
BALANCE = ("cv_importance", "cv_load", "max_over_mean_load", "max_vio")
Row = dict[str, Any]


def moe(experts: int, w_importance: float = 0.1, w_load: float = 0.1) -> Row:
    gate = {"kind": "noisy_top_k", "experts": experts, "k": K, "w_importance": w_importance, "w_load": w_load}
    return {"kind": "moe", "d_hidden": D_HIDDEN, "gate": gate}


TABLE_6 = {f"MoE-256, {i:g} / {load:g}": moe(256, i, load) for i, load in LOSSES}
TABLE_7 = {
    "MoE-256, 0.1 / 0.1": moe(256),
    "MoE-256-h": {
        "kind": "moe",
        "d_hidden": D_HIDDEN,
        "gate": {"kind": "hierarchical", "groups": 16, "group_size": 16, "k_groups": 2, "k_experts": 2},
    },
    "MoE-32": moe(32),
    "MoE-4": moe(4),
    "dense wide": {"kind": "dense", "hidden": [K * D_HIDDEN]},
    # At this small width the two gate matrices of MoE-256 cost as much as its experts; this control has that too.
    "dense wide + gate's ops": {"kind": "dense", "hidden": [K * D_HIDDEN + 256]},
    "dense deep": {"kind": "dense", "hidden": [D_HIDDEN] * 4},
    "4xLSTM": {"kind": "lstm", "layers": 2},
}


def operations(middle: Row) -> int:
    """Multiply-adds of a token, without embedding and softmax; the gate's two matrices included."""
    lstm = 8 * D_MODEL**2
    if middle["kind"] == "lstm":
        return (2 + middle["layers"]) * lstm
    if middle["kind"] == "dense":
        widths = [D_MODEL, *middle["hidden"], D_MODEL]
        return 2 * lstm + sum(a * b for a, b in itertools.pairwise(widths))
    gate = middle["gate"]
    if gate["kind"] == "hierarchical":  # the secondary gates of the chosen groups only
        logits = gate["groups"] + gate["k_groups"] * gate["group_size"]
    else:
        logits = gate["experts"]
    return 2 * lstm + 2 * D_MODEL * (K * middle["d_hidden"] + logits)


def train_one(name: str, middle: Row, seed: int, corpus: Path, work: Path) -> Row:
    output = work / f"{name.replace(' ', '').replace('/', '-')}-seed{seed}"
    data = {"train": corpus, "level": "byte", "valid_fraction": 0.01, "streams": 64, "window": 64}
    settings = {
        "data": data,
        "model": {"d_model": D_MODEL, "dropout": 0.0, "middle": middle},
        "optim": {"lr": 0.01, "warmup_steps": 100},
        "steps": STEPS,
        "output": output,
        "seed": seed,
        "log_every": 100,
        "eval_every": 250,
        "checkpoint_every": STEPS,
        "keep_checkpoints": 1,
    }
    config = TrainConfig.model_validate(settings)
    trainer = Trainer(config, load_corpus(config.data))
    model = trainer.model
    embed_and_softmax = count_parameters(model.embedding) + count_parameters(model.softmax)
    began = time.perf_counter()
    result = trainer.run(show=False)
    rows = read_log(output / "log.csv")
    return {
        "model": name,
        "seed": seed,
        "perplexity": result.perplexity,
        "curve": [(r["step"], r["valid_perplexity"]) for r in rows if "valid_perplexity" in r],
        "train": {key: rows[-1].get(key) for key in BALANCE},
        "eval": result.stats.summary() if result.stats else None,
        "operations": operations(middle),
        "parameters": count_parameters(model) - embed_and_softmax,
        "seconds": time.perf_counter() - began,
    }


def read_results(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_all(corpus: Path, results: Path) -> None:
    torch.set_num_threads(1)
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["model"], r["seed"]) for r in read_results(results)}
    for seed, (name, middle) in itertools.product(SEEDS, (TABLE_6 | TABLE_7).items()):
        if (name, seed) in done:
            continue
        row = train_one(name, middle, seed, corpus, results.parent)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:24} seed {seed}  ppl {row['perplexity']:.3f}  {row['seconds']:.0f} s", flush=True)


def spread(values: list[float]) -> str:
    """Mean, with the smallest and largest value."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def show(title: str, names: list[str], rows: list[Row]) -> None:
    print(f"\n{title}\n")
    heads = ("model", "perplexity", "CV(Imp)", "CV(Load)", "max/mean Load", "MaxVio", "max/mean Load, eval mode")
    print(f"| {' | '.join((*heads, 'ops/token', 'parameters', 'seeds'))} |")
    print("|---" * (len(heads) + 3) + "|")
    for name in names:
        runs = [r for r in rows if r["model"] == name]
        if not runs:
            continue
        gated = runs[0]["eval"] is not None
        cells = [name, spread([r["perplexity"] for r in runs])]
        cells += [spread([r["train"][key] for r in runs]) if gated else "-" for key in BALANCE]
        cells.append(spread([r["eval"]["max_over_mean_load"] for r in runs]) if gated else "-")
        cells += [f"{runs[0]['operations']:,}", f"{runs[0]['parameters']:,}", ", ".join(str(r["seed"]) for r in runs)]
        print(f"| {' | '.join(cells)} |")


def plot(title: str, names: list[str], rows: list[Row], picture: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="validation perplexity (bytes)", title=title, ylim=(4.4, 8))
    for index, name in enumerate(names):
        for row in (r for r in rows if r["model"] == name):
            label = name if row["seed"] == SEEDS[0] else None
            axes.plot(*zip(*row["curve"], strict=True), color=f"C{index}", linewidth=1, label=label)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--plots", type=Path, default=Path("benchmarks/plots"))
    options = parser.parse_args()
    if options.what == "run":
        if options.corpus is None:
            parser.error("run needs --corpus")
        run_all(options.corpus, options.results)
        return
    rows = read_results(options.results)
    options.plots.mkdir(parents=True, exist_ok=True)
    for number, models in ((6, TABLE_6), (7, TABLE_7)):
        show(f"Table {number}", list(models), rows)
        plot(f"The shape of table {number}", list(models), rows, options.plots / f"moe_table{number}.png")


if __name__ == "__main__":
    main()
