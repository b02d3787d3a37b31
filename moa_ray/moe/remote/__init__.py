"""Experts as Ray actors: shards of experts on their own devices, and what sends rows to them.

The part of `moa_ray.moe` that knows Ray. From below: `transport` (messages over sockets), `snapshot`
(experts in files), `placement` (who holds what), `shard` (experts, gradients, steps) in a `worker`; on the
other side `rows`, `peers`, `forward`, `caller` (sending, failing over, catching up). None of these needs Ray;
`actors` and `pool` put them on a cluster.
"""
