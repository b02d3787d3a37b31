"""Models of Hugging Face with their experts in shards answer as they did whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moa_ray.moe import CheckpointError, PoolError, shard_experts

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

SMALL: dict[str, Any] = {"num_cpus_per_shard": 0.1}
BODY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
CONFIGS = [
    MixtralConfig(**BODY, num_local_experts=4),
    Qwen2MoeConfig(**BODY, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    Qwen3MoeConfig(**BODY, num_experts=6, moe_intermediate_size=16),
    OlmoeConfig(**BODY, num_experts=4),
]
TOKENS = torch.tensor([[1, 5, 9, 33, 2], [7, 7, 60, 3, 4]])


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def whole(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param).eval()


@torch.no_grad()
def test_logits_and_generation_from_files_equal_the_whole_model(whole: Any, tmp_path: Path) -> None:
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    sharded = shard_experts(tmp_path, shards=2, **SMALL)
    try:
        assert sum(p.numel() for p in sharded.parameters()) < sum(p.numel() for p in whole.parameters())
        torch.testing.assert_close(sharded(TOKENS).logits, whole(TOKENS).logits, rtol=0, atol=1e-5)
        made = [m.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (whole, sharded)]
        assert torch.equal(*made)
    finally:
        sharded.expert_pool.close()


@torch.no_grad()
def test_a_model_in_memory_gives_its_experts_away() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[0]).eval()
    expected = model(TOKENS).logits
    assert shard_experts(model, shards=4, **SMALL) is model
    try:
        assert not [name for name, _ in model.named_parameters() if "gate_up_proj" in name]
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
    finally:
        model.expert_pool.close()


def test_models_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no experts"):
        shard_experts(AutoModelForCausalLM.from_config(LlamaConfig(**BODY | {"num_experts_per_tok": None})), shards=2)
    with pytest.raises(PoolError, match=r"GptOssExperts is not SwiGLU without biases"):
        shard_experts(AutoModelForCausalLM.from_config(GptOssConfig(**BODY, num_local_experts=4)), shards=2)
    with pytest.raises(CheckpointError, match="no model of transformers"):
        shard_experts(tmp_path, shards=2)
    model = AutoModelForCausalLM.from_config(CONFIGS[0])
    with pytest.raises(PoolError, match="5 shards for 4 experts"):
        shard_experts(model, shards=5)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.1.block_sparse_moe.experts.3.", "gone."))
    with pytest.raises(CheckpointError, match=r"lacks 1 experts, such as model\.layers\.1\.mlp\.experts\.3"):
        shard_experts(tmp_path, shards=2)
