"""Names in files: one key per expert, and back."""

from __future__ import annotations

import pytest
import torch

from swinmoe import MoEConfig, MoEMlp
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.naming import expert_key, num_experts, stacked_key, to_files, to_model
from swinmoe.errors import CheckpointError


def test_a_layer_there_and_back() -> None:
    layer = MoEMlp(MoEConfig(num_experts=3, shared_expert_ratio=0.5), dim=4, hidden_dim=8)
    state = {f"layers.0.mlp.{name}": tensor for name, tensor in layer.state_dict().items()}
    files = to_files(state)
    assert files["layers.0.mlp.experts.2.fc1.weight"].shape == (8, 4)
    assert files["layers.0.mlp.experts.0.fc2.weight"].shape == (4, 8)
    assert files["layers.0.mlp.shared.0.fc2.bias"].shape == (4,)
    assert not any("fc1_weight" in name for name in files)
    assert num_experts(files) == {"layers.0.mlp.experts": 3}
    back = to_model(files)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_names_of_no_expert_stay() -> None:
    assert expert_key("layers.0.mlp.fc1.weight", 0) is None
    assert stacked_key("layers.0.mlp.fc1.weight") is None
    assert stacked_key("experts.12.fc2.bias") == ("experts.fc2_bias", 12)


def test_a_missing_expert_is_not_invented() -> None:
    files = {f"x.experts.{e}.fc1.bias": torch.zeros(2) for e in (0, 1, 3)}
    with pytest.raises(CheckpointError, match=r"'x.experts.fc1_bias' has experts up to 3 but lacks \[2\]"):
        to_model(files)
    files["x.experts.2.fc1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="different shapes"):
        to_model(files)


def test_a_report_refuses_what_nobody_allowed() -> None:
    report = LoadReport("file", loaded=("a",), unused=("head.weight",), missing=("norm.bias", "norm.weight"))
    with pytest.raises(CheckpointError, match=r"file lacks norm.bias, norm.weight; file has.*head.weight"):
        report.check()
    with pytest.raises(CheckpointError, match=r"head.weight"):
        report.check(["norm.*"])
    assert report.check(["norm.*", "head.weight"]) is report
    assert "2 missing: norm.bias, norm.weight" in report.summary()
