"""Initial weights depend on the seed and the parameter's name, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from swinmoe.config import ModelConfig, MoEConfig
from swinmoe.models import SwinTransformer, build_model

BASE = {
    "style": "v2",
    "img_size": (16, 16),
    "patch_size": (2, 2),
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": (4, 4),
    "num_classes": 10,
}
SPARSE = {"moe": MoEConfig(num_experts=2), "moe_blocks": ((), (1,))}


def test_twins_share_every_parameter_that_both_have() -> None:
    dense = build_model(ModelConfig(**BASE), seed=3).state_dict()
    moe = build_model(ModelConfig(**BASE, **SPARSE), seed=3).state_dict()
    shared = dense.keys() & moe.keys()
    assert {name for name in dense if name not in shared} == {
        f"layers.1.blocks.1.mlp.{part}.{leaf}" for part in ("fc1", "fc2") for leaf in ("weight", "bias")
    }
    assert all(torch.equal(dense[name], moe[name]) for name in shared)


def test_values_depend_on_the_seed_and_not_on_depth_dtype_or_the_global_generator() -> None:
    first = build_model(ModelConfig(**BASE), seed=1).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    deeper = build_model(ModelConfig(**{**BASE, "depths": (2, 4)}), seed=1, dtype=torch.float64).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value.double(), deeper[name]) for name, value in first.items())
    other = build_model(ModelConfig(**BASE), seed=2).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["layers.0.blocks.0.mlp.fc1.weight"], first["layers.0.blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("style", ["v1", "v2", "swin_moe"])
def test_distributions(style: str) -> None:
    cfg = ModelConfig(**{**BASE, "style": style, "init_std": 0.005, "absolute_pos_embed": True})
    model = build_model(cfg)
    for name, value in model.state_dict().items():
        if name.startswith("patch_embed.proj"):
            bound = 1 / math.sqrt(3 * 2 * 2)
            assert 0.8 * bound < value.abs().max() <= bound
        elif "norm" in name.split(".")[-2] if "." in name else False:
            ends_branch = style == "v2" and ("norm1" in name or "norm2" in name)
            assert bool((value == (1.0 if name.endswith("weight") and not ends_branch else 0.0)).all()), name
        elif name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
            assert 0.015 < value.std() < 0.025, name
        elif name.endswith("logit_scale"):
            assert torch.allclose(value, torch.tensor(10.0).log())
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            assert value.std() == pytest.approx(0.005, rel=0.2 if value.numel() > 500 else 0.5), name


def test_meta_models_have_no_storage() -> None:
    model = build_model(ModelConfig(**BASE, **SPARSE), device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model, SwinTransformer)
