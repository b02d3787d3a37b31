"""`ExpertPool`: experts in shards, each an actor with its own device; what the `MoE` layer takes as its experts."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from moa_ray.moe.errors import CheckpointError, PoolError
from moa_ray.moe.experts import Activation, LocalExperts, check_sizes
from moa_ray.moe.remote.actors import Keeper, RayDirectory
from moa_ray.moe.remote.autograd import RemoteCall
from moa_ray.moe.remote.balancer import Load, LoadMeter
from moa_ray.moe.remote.caller import Caller
from moa_ray.moe.remote.peers import Patience
from moa_ray.moe.remote.placement import Placement, check_placement, spread
from moa_ray.moe.remote.shard import ShardSpec
from moa_ray.moe.remote.snapshot import Fresh, Loaded, Sizes, Snapshots, Source
from moa_ray.moe.remote.staff import Staff, ask_all, start, stop

_MANIFEST = "pool.json"


class ExpertPool:
    """Experts in shards; follows the `Experts` protocol and is differentiable.

    Made by `launch`. A copy that is sent to another process (pickled) is for inference; one that trains as
    another data-parallel caller is made by `caller`.
    """

    def __init__(self, staff: Staff, rank: int | None) -> None:
        self._staff = staff
        self._keeper = staff.keeper
        self._directory = RayDirectory(self._keeper)
        self._caller = Caller(staff.spec.sizes, self._directory, staff.secret, staff.patience, rank)
        self._actors: dict[str, Any] = {}
        self._groups: list[PlacementGroup] = []
        self._scratch: list[Path] = []
        self.num_experts = staff.spec.sizes.num_experts
        self.d_model = staff.spec.sizes.d_model
        self._run = RemoteCall(self._caller)

    @classmethod
    def launch(
        cls,
        num_experts: int,
        d_model: int,
        d_hidden: int,
        shards: int = 1,
        *,
        replicas: int = 1,
        layers: int = 1,
        num_gpus_per_shard: float = 0.0,
        num_cpus_per_shard: float = 1.0,
        activation: Activation = "relu",
        dtype: str = "float32",
        source: Source | None = None,
        callers: int = 1,
        snapshot_dir: Path | str | None = None,
        snapshot_every: int = 20,
        patience: Patience | None = None,
        placement_timeout_s: float = 60.0,
    ) -> ExpertPool:
        """Starts the shards' actors on the Ray cluster that this process has joined, or on a local one.

        Args:
            num_experts: E.
            d_model: D, width of tokens.
            d_hidden: H, width of an expert's hidden layer.
            shards: Parts that the experts are spread over, consecutive ones together.
            replicas: Actors that hold the same part, on different nodes where there are some.
            layers: Layers that the experts belong to; a shard holds its part of each. See `layer`.
            num_gpus_per_shard: GPUs of each actor; a fraction shares one.
            num_cpus_per_shard: CPUs of each actor, and its threads.
            activation: `relu` or `swiglu`.
            dtype: Of weights and rows: float32, bfloat16 or float16.
            source: Where the experts come from: `Fresh(seed)`, or `Snapshots(directory)` of a checkpoint.
            callers: Data-parallel callers that train; a step waits for all of them.
            snapshot_dir: Where snapshots go; must be seen by all nodes. None: a new directory of this machine.
            snapshot_every: Optimizer steps between two snapshots. A caller keeps the rows since the last one.
            patience: How long to wait for what.
            placement_timeout_s: How long to wait for room on the cluster.

        Raises:
            PoolError: Sizes that cannot be, or a snapshot directory that is not empty.
            CheckpointError: The source lacks experts, or has others.
            ResourcesShort: A worker has nowhere to run; nothing is left behind.
            ClusterError: The actors did not start; nothing is left behind.
        """
        placement = spread(num_experts, shards, replicas, layers)
        source = source or Fresh()
        check_sizes(num_experts, d_model, d_hidden, activation)
        sizes = Sizes(num_experts, d_model, d_hidden, activation, dtype)
        source.check(sizes)
        patience = patience or Patience()
        scratch = [] if snapshot_dir else [Path(tempfile.mkdtemp(prefix="moa-ray-pool-"))]
        directory = Path(snapshot_dir or scratch[0]).absolute()
        if any(directory.glob("*.safetensors")):
            raise PoolError(f"{directory} holds snapshots of another pool", hint="an empty snapshot_dir")
        spec = ShardSpec(
            sizes=sizes,
            source=source,
            snapshots=Snapshots(str(directory)),
            snapshot_every=snapshot_every,
            callers=callers,
            patience_s=0.75 * patience.call_s,
            threads=max(1, int(num_cpus_per_shard)),
        )
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        bundle = {k: v for k, v in {"CPU": num_cpus_per_shard, "GPU": num_gpus_per_shard}.items() if v}
        name = f"moa-ray-pool-{secrets.token_hex(8)}"
        keeper = ray.remote(num_cpus=0)(Keeper).options(name=name).remote(placement)
        staff = Staff(name, spec, secrets.token_hex(16), patience, bundle)
        actors: dict[str, Any] = {}
        groups: list[PlacementGroup] = []
        try:
            actors, group = start(staff, list(placement), placement_timeout_s)
            groups.append(group)
            pool = cls(staff, rank=0)
        except BaseException:
            stop([keeper, *actors.values()], groups)
            for made in scratch:
                shutil.rmtree(made, ignore_errors=True)
            raise
        # The first handle must be kept: Ray ends a named actor when that one goes.
        pool._keeper, pool._actors, pool._groups = keeper, actors, groups
        pool._scratch = scratch
        return pool

    @classmethod
    def of(cls, local: LocalExperts, shards: int = 1, *, loaded: Loaded | None = None, **options: Any) -> ExpertPool:
        """A pool of experts that are here already; options as in `launch`.

        Args:
            local: The experts.
            shards: As in `launch`.
            loaded: Their weights with the moments and the version that they have reached.
            options: As in `launch`.
        """
        loaded = loaded or Loaded({name: tensor.detach() for name, tensor in local.state_dict().items()})
        dtype = str(local.w_in_EDH.dtype).removeprefix("torch.")
        sizes = Sizes(local.num_experts, local.d_model, local.d_hidden, local.activation, dtype)
        return cls.holding(loaded, sizes, shards, **options)

    @classmethod
    def holding(cls, loaded: Loaded, sizes: Sizes, shards: int = 1, **options: Any) -> ExpertPool:
        """A pool that begins with what is in this process, moments and version included; options as in `launch`."""
        directory = Path(tempfile.mkdtemp(prefix="moa-ray-experts-"))
        source = Snapshots(str(directory))
        try:
            source.write("local", range(sizes.num_experts), loaded)
            options = {"activation": sizes.activation, "dtype": sizes.dtype, "source": source, **options}
            pool = cls.launch(sizes.num_experts, sizes.d_model, sizes.d_hidden, shards, **options)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        pool._scratch.append(directory)
        return pool

    @classmethod
    def resume(cls, directory: Path | str, shards: int = 1, **options: Any) -> ExpertPool:
        """A pool as `save` left it, in any number of shards; options as in `launch`.

        Raises:
            CheckpointError: It is missing, damaged, or lacks experts.
        """
        path = Path(directory).absolute() / _MANIFEST
        try:
            sizes = Sizes(**json.loads(path.read_text(encoding="utf-8"))["sizes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no checkpoint of a pool: {error}") from error
        source = Snapshots(str(path.parent))
        options = {"activation": sizes.activation, "dtype": sizes.dtype, "source": source, **options}
        return cls.launch(sizes.num_experts, sizes.d_model, sizes.d_hidden, shards, **options)

    def caller(self, rank: int) -> ExpertPool:
        """The same pool for another data-parallel caller; use it in this process or pass it on to another.

        Args:
            rank: 0 to `callers` - 1; 0 is the pool that `launch` returned. Gradients are summed in this order.
        """
        if not 0 <= rank < self._staff.spec.callers:
            raise PoolError(f"rank {rank} of {self._staff.spec.callers} callers", hint="launch(..., callers=n)")
        return ExpertPool(self._staff, rank)

    @property
    def connection(self) -> Caller:
        """What sends this copy's rows; for what else puts rows together, such as the router."""
        return self._caller

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertPool, (self._staff, None)

    # What the layer asks.

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Runs every expert on its own rows; see `Experts`.

        Raises:
            ExpertsLost: Without autograd: experts that have no living holder.
            PoolLost: With autograd: experts that did not come back in time.
            PoisonedBatch: The batch has killed two workers.
        """
        return self._run(x_RD, counts_E)

    def living(self) -> Tensor | None:
        """Which experts can be asked now, bool of shape (E,); None for all, and with autograd, which waits."""
        return None if torch.is_grad_enabled() else self._caller.living()

    # Training.

    def gradient_norms(self) -> Tensor:
        """Norm of the gradient of each expert's two matrices, summed over all callers, of shape (2, E)."""
        return self._caller.reduce()

    def step(self, lr: float, scale: float = 1.0) -> int:
        """One step of Adam in every shard, applied exactly once whatever dies; returns the steps done.

        Args:
            lr: Learning rate.
            scale: What gradients are multiplied by first, as for clipping.
        """
        return self._caller.step(lr, scale)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, as `LocalExperts.state_dict` has them; whole, in this process."""
        return self._caller.state()

    def moments(self) -> tuple[dict[str, Tensor], int]:
        """Adam's moments, by `WEIGHT.MOMENT`, and the steps done; none before the first step."""
        return (self._caller.state(moments=True) if self._caller.version else {}), self._caller.version

    def save(self, directory: Path | str) -> None:
        """Writes a checkpoint that `resume` reads: weights, moments and steps, each shard its own file."""
        target = Path(directory).absolute()
        target.mkdir(parents=True, exist_ok=True)
        ask_all(actor.save.remote(str(target)) for actor in self._actors.values())
        (target / _MANIFEST).write_text(json.dumps({"sizes": asdict(self._staff.spec.sizes)}), encoding="utf-8")

    # The workers.

    @property
    def placement(self) -> Placement:
        """Experts of each worker."""
        return {name: worker.experts for name, worker in self._directory.table().workers.items()}

    def facts(self) -> Mapping[str, dict[str, Any]]:
        """Of each worker: process, version, rows of each expert so far, seconds busy."""
        return dict(zip(self._actors, ask_all(a.facts.remote() for a in self._actors.values()), strict=True))

    def load(self) -> Load:
        """Rows of each expert and worker so far, with the paper's measures of balance."""
        return LoadMeter(self.num_experts).read(self.facts())

    def place(self, placement: Placement, *, timeout_s: float = 60.0) -> None:
        """Moves experts between workers, adds and removes workers; calls go on meanwhile.

        Args:
            placement: Experts of each worker from now on. A new name is a new worker, one left out is removed.
            timeout_s: How long to wait for room for new workers.

        Raises:
            PoolError: An expert would be nowhere.
            ResourcesShort: A new worker has nowhere to run; all is as before.
        """
        check_placement(placement, self.num_experts)
        placement = {name: tuple(sorted(set(experts))) for name, experts in placement.items()}
        before = self.placement
        ask_all(actor.save.remote(None) for actor in self._actors.values())
        both = {n: tuple(sorted({*e, *before.get(n, ())})) for n, e in placement.items()}
        changed = [name for name in placement if name in before and before[name] != placement[name]]
        ask_all(self._actors[name].assign.remote(both[name]) for name in changed)
        added = [name for name in placement if name not in before]
        if added:
            self._publish(before | {name: placement[name] for name in added})
            try:
                actors, group = start(self._staff, added, timeout_s)
            except BaseException:
                self._publish(before)
                raise
            self._actors |= actors
            self._groups.append(group)
        self._publish(placement)
        ask_all(self._actors[name].assign.remote(placement[name]) for name in changed)
        stop([self._actors.pop(name) for name in before.keys() - placement.keys()], [])

    def _publish(self, placement: Placement) -> None:
        ask_all([self._keeper.place.remote(placement)])

    def close(self) -> None:
        """Ends all actors, if this is the pool that `launch` returned, and closes the connections."""
        self._caller.close()
        self._directory.close()
        if self._actors:
            stop([self._keeper, *self._actors.values()], self._groups)
            self._actors, self._groups = {}, []
        for directory in self._scratch:
            shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> ExpertPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
