from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_ray.moe import CheckpointError, ConfigError, GateError, TrainingError
from moa_ray.moe.checkpoint import Checkpoint, load_checkpoint
from moa_ray.moe.config import load_config
from moa_ray.moe.interrupt import held_interrupts
from moa_ray.moe.model import State
from moa_ray.moe.report import read_log
from moa_ray.moe.train import Trainer, load_corpus, train

Write = Callable[..., Path]
GATES = [
    {"kind": "noisy_top_k", "experts": 4, "k": 2},
    {"kind": "hierarchical", "groups": 2, "group_size": 2, "k_experts": 1},
    {"kind": "strictly_balanced", "experts": 4, "k": 2},
    {"kind": "loss_free", "experts": 4, "k": 2},
]


def model_of(gate: dict[str, Any], d_model: int = 8) -> dict[str, Any]:
    return {"d_model": d_model, "dropout": 0.1, "middle": {"kind": "moe", "gate": gate, "d_hidden": 8}}


def same(a: Checkpoint, b: Checkpoint) -> bool:
    pairs = [(a.model, b.model), (a.run, b.run)]
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def everything(corpus: Path) -> dict[str, Any]:
    """Words, sampled softmax, autocast, and a layer with capacity, shared experts and recomputation."""
    model = model_of(GATES[0])
    model["middle"] |= {"capacity_factor": 1.0, "recompute": True, "shared_hidden": 4, "activation": "swiglu"}
    data = {"train": str(corpus), "level": "word", "streams": 4, "window": 8, "valid_fraction": 0.1}
    return {"model": model, "data": data, "sampled_softmax": 8, "autocast": "bfloat16"}


@pytest.mark.parametrize("gate", [*GATES, None], ids=lambda g: g["kind"] if g else "everything")
def test_a_resumed_run_ends_in_the_same_bits_as_one_without_a_break(
    config_file: Write, tmp_path: Path, gate: dict[str, Any] | None
) -> None:
    changes = {"model": model_of(gate)} if gate else everything(tmp_path / "corpus.txt")
    train(config_file(**changes, steps=12), output=tmp_path / "whole", show=False)
    train(config_file(**changes, steps=5), output=tmp_path / "parts", show=False)
    torch.manual_seed(999)  # whatever else drew random numbers in between
    train(config_file(**changes, steps=12), output=tmp_path / "parts", resume=True, show=False)
    assert same(load_checkpoint(tmp_path / "parts"), load_checkpoint(tmp_path / "whole"))


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(config_file: Write, tmp_path: Path) -> None:
    whole = train(config_file(), output=tmp_path / "whole", show=False)
    config = load_config(config_file()).model_copy(update={"output": tmp_path / "killed"})

    class Killed(Exception):
        pass

    class Dying(Trainer):
        def _train_step(self) -> Any:
            if self.step == 8:
                raise Killed
            return super()._train_step()

    with pytest.raises(Killed):
        Dying(config, load_corpus(config.data)).run(show=False)
    resumed = train(config_file(), output=tmp_path / "killed", resume=True, show=False)
    assert resumed.perplexity == whole.perplexity
    assert same(load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "whole"))
    # Rows of steps that were done twice stand in the log once.
    lines = (tmp_path / "killed" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "4", "6", "8", "12"]


def test_ctrl_c_ends_the_running_step_and_leaves_a_checkpoint_of_it(config_file: Write, tmp_path: Path) -> None:
    train(config_file(), output=tmp_path / "whole", show=False)
    config = load_config(config_file()).model_copy(update={"output": tmp_path / "broken"})

    class Interrupted(Trainer):
        def _train_step(self) -> Any:
            if self.step == 6:
                signal.raise_signal(signal.SIGINT)
            return super()._train_step()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config, load_corpus(config.data)).run(show=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path / "broken").step == 7
    train(config_file(), output=tmp_path / "broken", resume=True, show=False)
    assert same(load_checkpoint(tmp_path / "broken"), load_checkpoint(tmp_path / "whole"))


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), held_interrupts() as came:
        signal.raise_signal(signal.SIGINT)
        assert came.is_set()
        signal.raise_signal(signal.SIGINT)


def test_training_runs_in_other_threads_than_the_main_one(config_file: Write, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: train(config_file(steps=2), show=False))
    thread.start()
    thread.join(60)
    assert load_checkpoint(tmp_path / "run").step == 2


def test_training_learns_and_leaves_log_plot_and_checkpoint(config_file: Write, tmp_path: Path) -> None:
    result = train(config_file(steps=150, eval_every=50, log_every=50), show=False)
    rows = read_log(tmp_path / "run" / "log.csv")
    perplexities = [row["valid_perplexity"] for row in rows]
    assert result.perplexity == pytest.approx(perplexities[-1])
    assert perplexities[-1] < perplexities[0] < 256
    assert result.perplexity < 12  # bytes used in the text: 19
    assert all(row["max_over_mean_load"] >= 1 for row in rows)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(result.checkpoint).step == result.steps == 150
    assert result.stats is not None and int(result.stats.counts_E.sum()) > 0


def trainer_of(config_file: Write, **changes: Any) -> Trainer:
    config = load_config(config_file(**changes))
    return Trainer(config, load_corpus(config.data))


def test_the_recurrent_state_is_carried_from_window_to_window_and_fresh_where_the_text_begins(
    config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_file, steps=200)
    count = len(trainer.corpus.train)
    assert count < 199
    fresh: list[int] = []
    features = trainer.model.features

    def spy(tokens_SB: torch.Tensor, state: State | None = None) -> Any:
        if state is None and trainer.model.training:
            fresh.append(trainer.step)
        return features(tokens_SB, state)

    monkeypatch.setattr(trainer.model, "features", spy)
    trainer.run(show=False)
    assert fresh == list(range(0, 200, count))


def test_balancing_losses_take_part_in_training(config_file: Write) -> None:
    ends: list[torch.Tensor] = []
    for weight in (0.0, 1.0):
        trainer = trainer_of(config_file, model=model_of(GATES[0] | {"w_importance": weight, "w_load": weight}))
        trainer.run(show=False)
        ends.append(trainer.model.get_parameter("stack.layers.1.moe.gate.w_gate_DE"))
    assert not torch.equal(*ends)


def test_the_loss_free_gates_bias_moves_once_a_step(config_file: Write) -> None:
    trainer = trainer_of(config_file, model=model_of(GATES[3]), steps=1)
    trainer.run(show=False)
    bias_E = trainer.model.get_buffer("stack.layers.1.moe.gate.bias_E")
    torch.testing.assert_close(bias_E.abs().max(), torch.tensor(1e-3))


def test_gradients_are_clipped_to_the_norm_asked_for(config_file: Write) -> None:
    trainer = trainer_of(config_file, optim={"lr": 0.01, "warmup_steps": 1, "clip_norm": 1e-3}, steps=1)
    trainer.run(show=False)
    grads = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    torch.testing.assert_close(torch.stack(grads).norm(), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_word_level_with_sampled_softmax_learns(config_file: Write, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "corpus.txt"), "level": "word", "streams": 4, "window": 8}
    changes = {"data": data | {"valid_fraction": 0.1}, "sampled_softmax": 8, "steps": 150}
    assert train(config_file(**changes), show=False).perplexity < 8  # words in the text: 14


def test_a_dense_control_trains_without_gate_statistics(config_file: Write, tmp_path: Path) -> None:
    middle = {"kind": "dense", "hidden": [16]}
    result = train(config_file(model={"d_model": 8, "middle": middle}), show=False)
    assert result.stats is None
    assert "max_over_mean_load" not in read_log(tmp_path / "run" / "log.csv")[-1]


def test_bfloat16_autocast_trains(config_file: Write) -> None:
    assert train(config_file(autocast="bfloat16"), show=False).perplexity < 256


def test_a_separate_validation_file_is_used(config_file: Write, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("zzzz " * 100)
    data = {"train": str(tmp_path / "corpus.txt"), "valid": str(tmp_path / "valid.txt"), "level": "byte"}
    corpus = load_corpus(load_config(config_file(data=data | {"streams": 2, "window": 5})).data)
    assert set(corpus.valid[0][0].flatten().tolist()) == {ord("z"), ord(" ")}


def test_a_loss_that_is_no_number_stops_the_run(config_file: Write) -> None:
    with pytest.raises(TrainingError, match="no longer a number"):
        train(config_file(optim={"lr": 1e30, "warmup_steps": 1, "clip_norm": 1e30}), show=False)


def test_resuming_nothing_or_another_model_is_refused(config_file: Write, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        train(config_file(), resume=True, show=False)
    train(config_file(), show=False)
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape \(256, 8\) .*, \(256, 12\)"):
        train(config_file(model=model_of(GATES[0], d_model=12), steps=20), resume=True, show=False)
    (tmp_path / "other.txt").write_text("completely different words here " * 200)
    data = {"train": str(tmp_path / "other.txt"), "level": "word", "streams": 2, "window": 4}
    with pytest.raises(CheckpointError, match="vocabulary"):
        train(config_file(data=data, steps=20), resume=True, show=False)


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_old_one(config_file: Write) -> None:
    train(config_file(), show=False)
    with pytest.raises(ConfigError, match="holds checkpoints of another run"):
        train(config_file(), show=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"streams": 3}, "in 4 streams of 8 steps, .* in 3 streams of 8 steps"),
        ({"window": 7}, "in 4 streams of 8 steps, .* in 4 streams of 7 steps"),
        ({"valid_fraction": 0.2}, r"reads (\d+) tokens .* configuration (?!\1)\d+ tokens"),
    ],
)
def test_resuming_in_a_text_of_another_layout_is_refused(
    config_file: Write, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    train(config_file(), show=False)
    data = {"train": str(tmp_path / "corpus.txt"), "level": "byte", "streams": 4, "window": 8, "valid_fraction": 0.1}
    with pytest.raises(CheckpointError, match=complaint):
        train(config_file(data=data | change, steps=20), resume=True, show=False)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "bogus"])
def test_a_device_that_is_not_there_is_named(config_file: Write, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here: "):
        train(config_file(device=device), show=False)


def test_an_output_that_cannot_be_made_is_named(config_file: Write, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output .*/file: File exists"):
        train(config_file(output=str(tmp_path / "file")), show=False)


def test_a_part_of_the_corpus_that_is_too_short_is_named(config_file: Write, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "corpus.txt"), "level": "byte", "streams": 4, "window": 8, "valid_fraction": 1e-9}
    with pytest.raises(ConfigError, match="the validation text of 0 tokens is too short"):
        train(config_file(data=data), show=False)


def test_in_debug_mode_the_first_tensor_that_is_no_number_is_named(config_file: Write) -> None:
    model = model_of(GATES[0])
    model["middle"]["debug"] = True
    with pytest.raises(GateError, match="values that are NaN or infinite"):
        train(config_file(model=model, optim={"lr": 1e30, "warmup_steps": 1, "clip_norm": 1e30}), show=False)


def test_a_missing_corpus_is_named(config_file: Write) -> None:
    data = {"train": "/nowhere/corpus.txt", "streams": 2, "window": 4}
    with pytest.raises(ConfigError, match=r"/nowhere/corpus\.txt: No such file"):
        train(config_file(data=data), show=False)
