"""Training the language model: `moa-ray moe train CONFIG`."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moa_ray.gating import GateStats
from moa_ray.moe.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from moa_ray.moe.config import DataConfig, TrainConfig, load_config
from moa_ray.moe.errors import CheckpointError, ConfigError, TrainingError
from moa_ray.moe.interrupt import held_interrupts
from moa_ray.moe.model import LanguageModel, State, detach_state
from moa_ray.moe.optim import Adam
from moa_ray.moe.placed import experts_in_actors
from moa_ray.moe.report import Report, plot_losses
from moa_ray.moe.sampled_softmax import sampled_softmax_loss
from moa_ray.moe.text import Vocabulary, Windows, read_text


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: Optimizer steps done.
        perplexity: exp of the mean loss over the validation text.
        checkpoint: The last checkpoint.
        stats: The gate's statistics over the validation text; None for a model without a gate.
    """

    steps: int
    perplexity: float
    checkpoint: Path
    stats: GateStats | None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A vocabulary and the windows of training and validation text."""

    vocabulary: Vocabulary
    train: Windows
    valid: Windows


def train(config_path: Path, *, resume: bool = False, output: Path | None = None, show: bool = True) -> TrainResult:
    """Trains the model of a training file.

    Args:
        config_path: The YAML file; see `TrainConfig`.
        resume: Whether to go on from the newest checkpoint in the output directory. The result
            is bit for bit that of a run that was never interrupted.
        output: A directory instead of the file's `output`.
        show: Whether to draw a progress bar.

    Raises:
        ConfigError: The file or the corpus is wrong, or the output holds another run.
        CheckpointError: There is nothing to resume, or it is of another model.
        TrainingError: The loss is no longer a number.
        KeyboardInterrupt: Ctrl-C came; the step that was running has ended and is in a checkpoint.
    """
    config = load_config(config_path)
    if output is not None:
        config = config.model_copy(update={"output": output})
    return run(config, resume=resume, show=show)


def run(config: TrainConfig, *, resume: bool = False, show: bool = False) -> TrainResult:
    """The same as `train`, from a configuration in memory."""
    trainer = Trainer(config, load_corpus(config.data))
    if resume:
        trainer.restore()
    elif list_checkpoints(config.output / CHECKPOINTS):
        raise ConfigError(f"{config.output} holds checkpoints of another run", hint="--resume, or another output")
    return trainer.run(show=show)


def load_corpus(config: DataConfig) -> Corpus:
    """Reads, numbers and cuts the training and validation text."""
    text = read_text(config.train)
    if config.valid is None:
        cut = round(len(text) * (1 - config.valid_fraction))
        text, held_out = text[:cut], text[cut:]
    else:
        held_out = read_text(config.valid)
    vocabulary = Vocabulary.of(text, config.level, config.vocab_size)
    train_windows, valid_windows = (
        Windows(vocabulary.encode(part), config.streams, config.window, name=name)
        for part, name in ((text, "training text"), (held_out, "validation text"))
    )
    return Corpus(vocabulary, train_windows, valid_windows)


class Trainer:
    """One run: model, optimizer, text and the place in it.

    Args:
        config: The run.
        corpus: Its text.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.device = _usable_device(config.device)
        torch.manual_seed(config.seed)
        self.model = config.model.build(len(corpus.vocabulary)).to(self.device)
        self.optimizer = Adam(self.model)
        self.step = 0
        self.state: State | None = None

    def run(self, *, show: bool) -> TrainResult:
        """Trains until `config.steps`, logging, evaluating and saving on the way."""
        with experts_in_actors(self.model, self.optimizer, self.config.pool, self.step):
            return self._run(show)

    def _run(self, show: bool) -> TrainResult:
        config = self.config
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {config.output}: {error.strerror}") from error
        log = config.output / "log.csv"
        with Report(log, self.step, config.steps, show=show) as report, held_interrupts() as interrupted:
            meter, outcome = _Meter(), None
            while self.step < config.steps:
                meter.add(*self._train_step())
                report.advance()
                done = self.step == config.steps
                evaluating = done or self.step % config.eval_every == 0
                if evaluating or self.step % config.log_every == 0:
                    row = meter.row() | {"step": self.step, "learning_rate": config.optim.rate(self.step - 1)}
                    if evaluating:
                        outcome = self._evaluate()
                        row["valid_perplexity"] = outcome[0]
                    report.row(row)
                    meter = _Meter()
                if interrupted.is_set():
                    self.save()
                    raise KeyboardInterrupt
                if not done and self.step % config.checkpoint_every == 0:
                    self.save()
        # The last step is always evaluated; a run resumed at its very end has no step left.
        perplexity, stats = outcome or self._evaluate()
        checkpoint = self.save()
        plot_losses(log, config.output / "loss.png")
        return TrainResult(self.step, perplexity, checkpoint, stats)

    def _train_step(self) -> tuple[Tensor, GateStats | None, int]:
        self.model.train()
        if self.corpus.train.starts_text(self.step):
            self.state = None
        inputs_SB, targets_SB = (t.to(self.device) for t in self.corpus.train[self.step])
        with self._autocast():
            x_SBD, state, said = self.model.features(inputs_SB, self.state)
            loss = self._loss(x_SBD, targets_SB)
            total = loss + sum(aux.loss for aux in said)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step(self.config.optim.rate(self.step), self.config.optim.clip_norm)
        self.model.end_step()
        self.state = detach_state(state)
        self.step += 1
        return loss.detach(), said[0].stats if said else None, inputs_SB.numel()

    def _loss(self, x_SBD: Tensor, targets_SB: Tensor) -> Tensor:
        x_TD, targets_T = x_SBD.flatten(0, 1), targets_SB.flatten()
        if self.config.sampled_softmax:
            return sampled_softmax_loss(x_TD, targets_T, self.model.softmax, self.config.sampled_softmax)
        return F.cross_entropy(self.model.softmax(x_TD), targets_T)

    def _evaluate(self) -> tuple[float, GateStats | None]:
        with self._autocast():
            return evaluate(self.model, self.corpus.valid)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def save(self) -> Path:
        """Writes a checkpoint; returns its path."""
        run_tensors = self.optimizer.state() | _random_state(self.device)
        for index, pair in enumerate(self.state or []):
            if pair is not None:
                run_tensors |= {f"state/{index}/h": pair[0], f"state/{index}/c": pair[1]}
        checkpoint = Checkpoint(
            self.step,
            self.config.model.model_dump(mode="json"),
            self.corpus.vocabulary,
            self.corpus.train.layout,
            self.optimizer.weights(),
            run_tensors,
        )
        return save_checkpoint(self.config.output / CHECKPOINTS, checkpoint, self.config.keep_checkpoints)

    def restore(self) -> None:
        """Goes back to the newest checkpoint in the output directory.

        Raises:
            CheckpointError: There is none, or its model, vocabulary or text is another.
        """
        saved = load_checkpoint(self.config.output)
        if saved.vocabulary != self.corpus.vocabulary:
            raise CheckpointError(f"{self.config.output}: the checkpoint's vocabulary is not that of the corpus")
        here = self.corpus.train.layout
        if saved.reads != here:  # a step would be another place in the text
            raise CheckpointError(f"{self.config.output}: the checkpoint reads {saved.reads}, the configuration {here}")
        load_weights(self.model, saved.model)
        self.optimizer.load(saved.run)
        self.state = [
            (saved.run[f"state/{i}/h"].to(self.device), saved.run[f"state/{i}/c"].to(self.device))
            if f"state/{i}/h" in saved.run
            else None
            for i in range(len(self.model.stack.layers))
        ]
        self.step = saved.step
        # Last, since everything above may draw random numbers.
        _set_random_state(saved.run, self.device)


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Windows) -> tuple[float, GateStats | None]:
    """Perplexity over a whole text in eval mode, state carried over, and the gate's statistics on it."""
    model.eval()
    device = model.softmax.weight.device
    state: State | None = None
    losses: list[Tensor] = []
    stats: GateStats | None = None
    for inputs_SB, targets_SB in windows:
        x_SBD, state, said = model.features(inputs_SB.to(device), state)
        logits_TV = model.softmax(x_SBD.flatten(0, 1))
        losses.append(F.cross_entropy(logits_TV, targets_SB.to(device).flatten()))
        if said:
            stats = said[0].stats if stats is None else stats + said[0].stats
    return math.exp(torch.stack(losses).double().mean().item()), stats


class _Meter:
    """Means over the steps between two rows of the log; reads the device only when a row is due."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._stats: GateStats | None = None
        self._tokens = 0
        self._began = time.perf_counter()

    def add(self, loss: Tensor, stats: GateStats | None, tokens: int) -> None:
        self._losses.append(loss)
        self._tokens += tokens
        if stats is not None:
            self._stats = stats if self._stats is None else self._stats + stats

    def row(self) -> dict[str, float]:
        loss = torch.stack(self._losses).mean().item()
        if not math.isfinite(loss):
            raise TrainingError(
                "the loss is no longer a number",
                hint="a lower optim.lr or a longer warm-up; model.middle.debug: true names the first such tensor",
            )
        figures = {"loss": loss, "tokens_s": self._tokens / (time.perf_counter() - self._began)}
        return figures | (self._stats.summary() if self._stats else {})


def _usable_device(name: str) -> torch.device:
    try:
        probe = torch.zeros(1, device=name)
        probe.tolist()  # fails on devices that hold no values
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}", hint="cpu, cuda or cuda:N") from error
    return probe.device


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
