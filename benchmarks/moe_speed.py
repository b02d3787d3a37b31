"""Speed of the local Mixture-of-Experts layer, as ratios of sides that take turns in one process.

    python benchmarks/moe_speed.py [--threads 2] [--device cuda]

On CPU in float32, on CUDA in bfloat16:
    grouped experts, and the whole layer, against one dense network of equal FLOPs
    grouped experts against Hugging Face's grouped_mm experts (SwiGLU) with the same routes
On CPU besides: a training step of the language model with 4, 32 and 256 experts.
"""

from __future__ import annotations

import argparse
import platform

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moa_ray.gating import SoftmaxTopK
from moa_ray.moe import LocalExperts, MoE
from moa_ray.moe.bench import compare, grouped_against_dense, training_step

TOKENS, D, H, E, K = 4096, 512, 1024, 32, 4


def against_hugging_face(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a forward pass from tokens and routes to combined results, routes given to both."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K)
    setattr(config, "_experts_implementation", "grouped_mm")  # noqa: B010 (private to transformers)
    theirs = MixtralExperts(config).to(device, dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ours = MoE(D, SoftmaxTopK(E, K), LocalExperts(E, D, H, activation="swiglu")).to(device, dtype)
    x_TD = torch.randn(TOKENS, D, device=device, dtype=dtype)
    routing = ours.gate(x_TD)
    weights_TK = routing.weights_TK.to(dtype)
    ours.gate.forward = lambda x_TD: routing  # only what follows the gate is compared

    def mine() -> None:
        with torch.no_grad():
            ours(x_TD)

    def hugging_face() -> None:
        with torch.no_grad():
            theirs(x_TD, routing.experts_TK, weights_TK)

    return compare({"hugging face grouped_mm": hugging_face, "moa-ray": mine})


def report(title: str, seconds: dict[str, float]) -> None:
    """Prints each side beside the first one; speed 2.00 is half the time."""
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:24} {value * 1e3:9.2f} ms   speed {first / value:5.2f}   time {value / first:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {options.threads} threads"
    print(f"torch {torch.__version__}, {where}, {dtype}; {TOKENS} tokens, d={D}, h={H}, {E} experts, k={K}")
    for backward in (False, True):
        seconds = grouped_against_dense(device=options.device, dtype=dtype, backward=backward)
        report(f"{'forward and backward' if backward else 'forward'}, ReLU experts", seconds)
    report("forward after the gate, SwiGLU experts", against_hugging_face(options.device, dtype))
    if not on_gpu:
        report("training step by number of experts, k=4, d=128, h=256, 8,192 tokens", training_step())


if __name__ == "__main__":
    main()
