"""Twins differ in nothing but their MLPs."""

from __future__ import annotations

import torch

from swinmoe.config import ModelConfig
from swinmoe.config.io import build
from swinmoe.models import build_model

SPARSE = build(ModelConfig, {"preset": "swin_moe_micro", "in_chans": 1, "drop_path_rate": 0.5})
DENSE = build(ModelConfig, {"preset": "swin_moe_micro", "in_chans": 1, "drop_path_rate": 0.5, "moe": None})


def test_shared_tensors_are_bit_equal_at_step_0() -> None:
    dense, sparse = (dict(build_model(c, seed=7).named_parameters()) for c in (DENSE, SPARSE))
    shared = dense.keys() & sparse.keys()
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)
    only_dense, only_sparse = dense.keys() - shared, sparse.keys() - shared
    assert only_dense and all(name.startswith("layers.1.blocks.1.mlp.") for name in only_dense | only_sparse)
    other = dict(build_model(DENSE, seed=8).named_parameters())
    assert any(not torch.equal(dense[name], other[name]) for name in dense)


def test_drop_paths_are_drawn_alike() -> None:
    """With experts that output zero and a dense MLP that does, twins under stochastic depth give the same logits."""
    twins = [build_model(c, seed=7).train() for c in (DENSE, SPARSE)]
    with torch.no_grad():
        for model in twins:
            for name, parameter in model.named_parameters():
                if ".mlp." in name and "fc2" in name:
                    parameter.zero_()
    images = torch.randn(16, 1, 32, 32)
    logits = []
    for model in twins:
        torch.manual_seed(3)
        logits.append(model(images).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    torch.manual_seed(4)
    assert not torch.equal(twins[0](images).logits, logits[0])
