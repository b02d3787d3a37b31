"""`ExpertPool`: experts in shards, each an actor with its own device; what the `MoE` layer takes as its experts."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from moa_ray.errors import ClusterError, ResourcesShort
from moa_ray.moe.errors import CheckpointError, PoolError
from moa_ray.moe.experts import Activation, LocalExperts
from moa_ray.moe.remote.actors import CONTROL_S, Keeper, RayDirectory, ShardActor
from moa_ray.moe.remote.autograd import RemoteCall
from moa_ray.moe.remote.caller import Caller
from moa_ray.moe.remote.peers import Patience
from moa_ray.moe.remote.placement import Placement, check_placement, spread
from moa_ray.moe.remote.shard import ShardSpec
from moa_ray.moe.remote.snapshot import Fresh, Loaded, Sizes, Snapshots, Source

_MANIFEST = "pool.json"


@dataclass(frozen=True, slots=True)
class _Staff:
    """What every copy of a pool knows; the keeper by its name, since a restarted actor must find it, too."""

    keeper_name: str
    spec: ShardSpec
    secret: str
    patience: Patience
    bundle: dict[str, float]

    @property
    def keeper(self) -> Any:
        return ray.get_actor(self.keeper_name)


class ExpertPool:
    """Experts in shards; follows the `Experts` protocol and is differentiable.

    Made by `launch`. A copy that is sent to another process (pickled) is for inference; one that trains as
    another data-parallel caller is made by `caller`.
    """

    def __init__(self, staff: _Staff, rank: int | None) -> None:
        self._staff = staff
        self._keeper = staff.keeper
        self._directory = RayDirectory(self._keeper)
        self._caller = Caller(staff.spec.sizes, self._directory, staff.secret, staff.patience, rank)
        self._actors: dict[str, Any] = {}
        self._groups: list[PlacementGroup] = []
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
        LocalExperts(1, d_model, d_hidden, activation=activation)  # its complaints about sizes are ours
        directory = Path(snapshot_dir or tempfile.mkdtemp(prefix="moa-ray-pool-")).absolute()
        if any(directory.glob("*.safetensors")):
            raise PoolError(f"{directory} holds snapshots of another pool", hint="an empty snapshot_dir")
        patience = patience or Patience()
        sizes = Sizes(num_experts, d_model, d_hidden, activation, dtype)
        source.check(sizes)
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
        staff = _Staff(name, spec, secrets.token_hex(16), patience, bundle)
        actors: dict[str, Any] = {}
        groups: list[PlacementGroup] = []
        try:
            actors, group = _start(staff, list(placement), placement_timeout_s)
            groups.append(group)
            pool = cls(staff, rank=0)
        except BaseException:
            _stop([keeper, *actors.values()], groups)
            raise
        # The first handle must be kept: Ray ends a named actor when that one goes.
        pool._keeper, pool._actors, pool._groups = keeper, actors, groups
        return pool

    @classmethod
    def of(cls, local: LocalExperts, shards: int = 1, **options: Any) -> ExpertPool:
        """A pool of experts that are here already; options as in `launch`."""
        directory = tempfile.mkdtemp(prefix="moa-ray-experts-")
        tensors = {name: tensor.detach() for name, tensor in local.state_dict().items()}
        Snapshots(directory).write("local", range(local.num_experts), Loaded(tensors))
        sizes = (local.num_experts, local.d_model, local.d_hidden)
        dtype = str(local.w_in_EDH.dtype).removeprefix("torch.")
        options = {"activation": local.activation, "dtype": dtype, "source": Snapshots(directory), **options}
        return cls.launch(*sizes, shards, **options)

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
        return self._caller.weights()

    def save(self, directory: Path | str) -> None:
        """Writes a checkpoint that `resume` reads: weights, moments and steps, each shard its own file."""
        target = Path(directory).absolute()
        target.mkdir(parents=True, exist_ok=True)
        _all(actor.save.remote(str(target)) for actor in self._actors.values())
        (target / _MANIFEST).write_text(json.dumps({"sizes": asdict(self._staff.spec.sizes)}), encoding="utf-8")

    # The workers.

    @property
    def placement(self) -> Placement:
        """Experts of each worker."""
        return {name: worker.experts for name, worker in self._directory.table().workers.items()}

    def facts(self) -> Mapping[str, dict[str, Any]]:
        """Of each worker: process, version, rows of each expert so far, seconds busy."""
        return dict(zip(self._actors, _all(a.facts.remote() for a in self._actors.values()), strict=True))

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
        _all(actor.save.remote(None) for actor in self._actors.values())
        both = {n: tuple(sorted({*e, *before.get(n, ())})) for n, e in placement.items()}
        changed = [name for name in placement if name in before and before[name] != placement[name]]
        _all(self._actors[name].assign.remote(both[name]) for name in changed)
        added = [name for name in placement if name not in before]
        if added:
            self._publish(before | {name: placement[name] for name in added})
            try:
                actors, group = _start(self._staff, added, timeout_s)
            except BaseException:
                self._publish(before)
                raise
            self._actors |= actors
            self._groups.append(group)
        self._publish(placement)
        _all(self._actors[name].assign.remote(placement[name]) for name in changed)
        _stop([self._actors.pop(name) for name in before.keys() - placement.keys()], [])

    def _publish(self, placement: Placement) -> None:
        _all([self._keeper.place.remote(placement)])

    def close(self) -> None:
        """Ends all actors, if this is the pool that `launch` returned, and closes the connections."""
        self._caller.close()
        self._directory.close()
        if self._actors:
            _stop([self._keeper, *self._actors.values()], self._groups)
            self._actors, self._groups = {}, []

    def __enter__(self) -> ExpertPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all(refs: Any) -> list[Any]:
    try:
        found: list[Any] = ray.get(list(refs), timeout=CONTROL_S)
    except GetTimeoutError as error:
        raise ClusterError(f"workers did not answer within {CONTROL_S:g} s") from error
    except RayActorError as error:
        raise ClusterError(f"a worker died: {error}") from error
    return found


def _start(staff: _Staff, names: list[str], timeout_s: float) -> tuple[dict[str, Any], PlacementGroup]:
    """Actors for some workers, on nodes as different as there are, or nothing at all."""
    group = placement_group([staff.bundle or {"CPU": 0.001} for _ in names], strategy="SPREAD")
    actors: dict[str, Any] = {}
    try:
        if not group.wait(timeout_s):
            raise _no_room(staff.bundle, names)
        for index, name in enumerate(names):
            make = ray.remote(ShardActor).options(
                num_cpus=staff.bundle.get("CPU", 0),
                num_gpus=staff.bundle.get("GPU", 0),
                max_restarts=-1,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            actors[name] = make.remote(name, staff.spec, staff.secret, staff.keeper_name)
        _all([staff.keeper.hire.remote(actors)])
        _all(actor.facts.remote() for actor in actors.values())
    except BaseException:
        _stop(actors.values(), [group])
        raise
    return actors, group


def _no_room(bundle: Mapping[str, float], names: Sequence[str]) -> ResourcesShort:
    """Says which worker is the first that does not fit beside those before it."""
    free = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    in_use = {k: ray.cluster_resources().get(k, 0) - ray.available_resources().get(k, 0) for k in bundle}
    wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    place = len(names) - 1
    for index in range(len(names)):
        node = next((node for node in free if all(node.get(k, 0) >= v for k, v in bundle.items())), None)
        if node is None:
            place = index
            break
        for kind, amount in bundle.items():
            node[kind] -= amount
    have = ", ".join(f"{ray.cluster_resources().get(k, 0):g} {k} of which {in_use[k]:g} in use" for k in bundle)
    return ResourcesShort(
        f"bundle {place} of {len(names)} ({names[place]}: {wanted}) cannot be placed: the cluster has {have}",
        hint="fewer shards or replicas, a fraction of a GPU each, or more nodes",
    )


def _stop(actors: Iterable[Any], groups: Iterable[PlacementGroup]) -> None:
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)
