"""A worker: a shard behind a server. It knows the wire and no Ray; `actors.py` puts it into an actor.

Every message has an `op`; every reply either its result or `error`, the name of what went wrong.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moa_ray.errors import MoARayError
from moa_ray.moe.errors import PoolLost, StalePool
from moa_ray.moe.remote.peers import GAP
from moa_ray.moe.remote.shard import Gap, Mark, Shard, ShardSpec
from moa_ray.moe.remote.snapshot import Source
from moa_ray.moe.remote.transport import Header, Server


class ShardWorker:
    """Serves one shard; its set of experts may be exchanged for another while it serves.

    Args:
        name: The worker's.
        spec: The pool's.
        experts: Which experts, ascending.
        secret: What callers must show.
        host: Where to listen for callers on other machines.
    """

    def __init__(self, name: str, spec: ShardSpec, experts: Sequence[int], secret: str, host: str) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self._name = name
        self._spec = spec
        self._swap = threading.Lock()
        self.shard = Shard(name, spec, experts)
        self._server = Server(self._answer, secret, host)
        self.address = self._server.address

    def close(self) -> None:
        """Takes no more callers."""
        self._server.close()

    def assign(self, experts: Sequence[int], source: Source | None = None) -> None:
        """Exchanges the experts; calls go on with the old ones until the new ones are there."""
        with self._swap:
            self.shard = Shard(self._name, self._spec, experts, source)

    def _answer(self, header: Header, payload: Tensor) -> tuple[Header, Tensor | None]:
        shard = self.shard  # one and the same for the whole message
        try:
            return self._perform(shard, header, payload)
        except Gap:
            return {"error": GAP}, None
        except (StalePool, PoolLost) as error:
            return {"error": type(error).__name__, "message": error.message}, None
        except (MoARayError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:  # the actor's boundary
            return {"error": "Failed", "message": f"{self._name}: {type(error).__name__}: {error}"}, None

    def _perform(self, shard: Shard, header: Header, payload: Tensor) -> tuple[Header, Tensor | None]:
        mark = Mark(*header["mark"]) if "mark" in header else None
        match header["op"]:
            case "forward":
                if mark:
                    shard.expect(mark)
                (x_RD,) = self._rows(payload, 1)
                counts_E = shard.counts(header["experts"], header["rows"])
                began = time.perf_counter()
                if shares := header.get("shares"):
                    counts_CE = torch.tensor([shard.spread(header["experts"], rows) for rows in shares])
                    y_RD = shard.forward_shares(x_RD, counts_CE)
                else:
                    y_RD = shard.forward(x_RD, counts_E, header.get("call", ""))
                shard.busy_s += time.perf_counter() - began
                return {}, y_RD
            case "backward":
                assert mark
                x_RD, g_RD = self._rows(payload, 2)
                counts_E = shard.counts(header["experts"], header["rows"])
                grad_x_RD = shard.backward(mark, header["call"], x_RD, counts_E, g_RD)
                return {}, grad_x_RD if header["answer"] else None
            case "reduce":
                assert mark
                return {"experts": list(shard.experts)}, shard.reduce(mark)
            case "step":
                assert mark
                shard.step(mark, header["lr"], header["scale"])
                return {"durable": shard.durable}, None
            case "greet":
                seen = shard.greet(header["rank"], header["life"])
                return {"seen": seen, "version": shard.version, "durable": shard.durable, "pid": os.getpid()}, None
            case "state":
                held = shard.state().tensors
                flat = torch.cat([held[name].cpu().flatten() for name in header["names"]])
                return {"experts": list(shard.experts)}, flat
            case op:
                raise ValueError(f"unknown operation {op!r}")

    def _rows(self, payload: Tensor, parts: int) -> tuple[Tensor, ...]:
        sizes = self._spec.sizes
        return payload.view(sizes.torch_dtype).view(parts, -1, sizes.d_model).unbind(0)
