"""`Router`: an actor that holds the gate of a pool and puts the batches of many callers together."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util import get_node_ip_address
from torch import Tensor

import moa_ray.moe.errors
from moa_ray.errors import MoARayError, ResourcesShort
from moa_ray.gating import Gate, GateError
from moa_ray.moe.errors import PoolLost
from moa_ray.moe.layer import MoE
from moa_ray.moe.remote.actors import CONTROL_S
from moa_ray.moe.remote.batcher import Batcher
from moa_ray.moe.remote.pool import ExpertPool
from moa_ray.moe.remote.snapshot import Sizes
from moa_ray.moe.remote.transport import Address, Channel, ChannelLost, Header, Server, raw

_PAUSE_S = 0.05


class Router:
    """A layer (gate, dispatch, experts, combine) behind one actor, for inference by any number of callers.

    Made by `launch`. A copy that is sent to another process (pickled) calls the same actor. Tokens and results
    travel over sockets, as between a pool and its callers. Safe to call from many threads: calls that come while
    others are computed go to the shards together, one message to each.
    """

    def __init__(self, actor: Any, secret: str, sizes: Sizes, answer_s: float) -> None:
        self._actor = actor
        self._secret = secret
        self._sizes = sizes
        self._answer_s = answer_s
        self._idle: list[Channel] = []
        self._lock = threading.Lock()

    @classmethod
    def launch(cls, gate: Gate, pool: ExpertPool, *, exact: bool = True, num_cpus: float = 1.0) -> Router:
        """Starts the actor.

        Args:
            gate: Chooses experts, in eval mode; its weights as they are now.
            pool: Holds the experts. It must be closed after the router.
            exact: Whether a call's result is bit for bit that of `LocalExperts`, whatever other calls it was put
                together with. False: an expert has one product for all callers, as in section 3.1 of Shazeer et al.
                2017, and results are equal within rounding.
            num_cpus: Of the actor, and its threads.

        Raises:
            GateError: Gate and pool do not fit each other.
            ResourcesShort: The actor has nowhere to run; nothing is left behind.
        """
        MoE(pool.d_model, gate, pool)  # its complaints are ours, and it gives the gate its width
        secret = secrets.token_hex(16)
        patience = pool.connection.patience
        make = ray.remote(_RouterActor).options(num_cpus=num_cpus, max_restarts=-1, max_concurrency=4)
        actor = make.remote(gate, pool, secret, exact, max(1, int(num_cpus)))
        try:
            ray.get(actor.address.remote(), timeout=CONTROL_S)
        except GetTimeoutError as error:
            ray.kill(actor)
            hint = "fewer CPUs for it, or for the shards"
            raise ResourcesShort(
                f"the router ({num_cpus:g} CPU) found no room in {CONTROL_S:g} s", hint=hint
            ) from error
        except BaseException:
            ray.kill(actor)
            raise
        return cls(actor, secret, pool.connection.sizes, 3 * (patience.call_s + patience.restore_s))

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer; no gradient goes through.

        Args:
            x: Tokens of shape (..., d_model), in the pool's dtype.

        Returns:
            The result, of the same shape.

        Raises:
            GateError: Wrong shape or dtype, or no tokens.
            PoisonedBatch: These tokens have killed two workers.
            PoolLost: Nobody answered in time; a router that died is restarted and asked again before.
        """
        if x.dim() < 2 or x.shape[-1] != self._sizes.d_model or not x.numel():
            raise GateError(f"x has shape {tuple(x.shape)}, expected (tokens, {self._sizes.d_model})")
        if x.dtype != self._sizes.torch_dtype:
            raise GateError(f"x has dtype {x.dtype}, the pool {self._sizes.torch_dtype}", hint="x.to(...)")
        payload = self._ask({"op": "forward"}, x.detach().cpu().contiguous())[1]
        return payload.view(x.dtype).view(x.shape).to(x.device)

    def stats(self) -> dict[str, float]:
        """The gate's statistics over all calls since the actor started, as `GateStats.summary`, and `batches` sent."""
        stats: dict[str, float] = self._ask({"op": "stats"}, None)[0]["stats"]
        return stats

    def close(self) -> None:
        """Ends the actor; only the process that launched it should."""
        self._drop()
        ray.kill(self._actor)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Router, (self._actor, self._secret, self._sizes, self._answer_s)

    def _ask(self, header: Header, x_TD: Tensor | None) -> tuple[Header, Tensor]:
        give_up = time.monotonic() + self._answer_s
        while True:
            channel = self._channel(give_up)
            try:
                channel.send(header, () if x_TD is None else (raw(x_TD),), give_up)
                reply, payload = channel.receive(give_up)
            except ChannelLost:  # the actor died: it computes and keeps nothing, so ask again
                self._drop()
                continue
            with self._lock:
                self._idle.append(channel)
            if kind := reply.get("error"):
                raise _error(kind, reply["message"])
            return reply, payload

    def _channel(self, give_up: float) -> Channel:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        while (left := give_up - time.monotonic()) > 0:
            try:
                # An actor that is starting again answers when it has.
                address = ray.get(self._actor.address.remote(), timeout=left)
                return Channel.connect(address, self._secret)
            except ChannelLost:
                time.sleep(_PAUSE_S)
            except GetTimeoutError:
                break
            except ActorUnavailableError:
                time.sleep(_PAUSE_S)
            except RayError as error:
                hint = "Router.launch starts a new one on the same pool"
                raise PoolLost("the router is gone for good", hint=hint) from error
        raise PoolLost(f"the router did not answer within {self._answer_s:g} s", hint="is its node still there?")

    def _drop(self) -> None:
        with self._lock:
            for channel in self._idle:
                channel.close()
            self._idle.clear()


class _RouterActor:
    def __init__(self, gate: Gate, pool: ExpertPool, secret: str, exact: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pool = pool
        self._batcher = Batcher(gate, pool.connection, exact=exact)
        self._server = Server(self._answer, secret, get_node_ip_address())

    def address(self) -> Address:
        return self._server.address

    def _answer(self, header: Header, payload: Tensor) -> tuple[Header, Tensor | None]:
        if header["op"] == "stats":
            stats = self._batcher.stats()
            return {"stats": (stats.summary() if stats else {}) | {"batches": self._batcher.batches}}, None
        x_TD = payload.view(self._pool.connection.sizes.torch_dtype).view(-1, self._pool.d_model)
        try:
            return {}, self._batcher.forward(x_TD)
        except MoARayError as error:
            return {"error": type(error).__name__, "message": error.message}, None
        except (RuntimeError, ValueError, TypeError, OSError) as error:  # the actor's boundary
            return {"error": PoolLost.__name__, "message": f"router: {type(error).__name__}: {error}"}, None


def _error(kind: str, message: str) -> MoARayError:
    known = {"GateError": GateError} | vars(moa_ray.moe.errors)
    error: MoARayError = known.get(kind, PoolLost)(message)
    return error
