"""The checkpoint folder: atomic, complete or refused, newest found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swinmoe.checkpoint import drop_newer, latest_checkpoint, load_checkpoint, save_checkpoint
from swinmoe.errors import CheckpointError


def _tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"a/model": {"w": torch.full((2, 3), value)}, "a/optimizer": {"w#exp_avg": torch.full((2, 3), -value)}}


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.randn(5, 7, dtype=torch.float64), "t": torch.randn(3, 4).t(), "n": torch.tensor(3)}}
    path = save_checkpoint(tmp_path, 12, tensors, {"seed": 4}, keep_last=1)
    back = load_checkpoint(path)
    assert back.step == 12 and back.state == {"seed": 4, "step": 12}
    for name, tensor in tensors["model"].items():
        assert torch.equal(back.tensors["model"][name], tensor)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        written = save_checkpoint(tmp_path, step, _tensors(step), {}, keep_last=2)
        assert written.is_dir()  # what was just written is never the one to go
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000010"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-00000010"
    drop_newer(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    save_checkpoint(tmp_path, 4, _tensors(4), {}, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_unfinished_and_truncated_are_passed_over(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=9)
    cut = save_checkpoint(tmp_path, 2, _tensors(2), {}, keep_last=9)
    file = cut / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / ".writing-step-00000003").mkdir()
    bare = tmp_path / "step-00000004"
    bare.mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged"):
        load_checkpoint(cut)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(bare)


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=1)
    file = path / "a" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_previous_one(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 1, _tensors(1), {}, keep_last=1)
    (tmp_path / ".writing-step-00000002").write_text("a file where the folder should go")
    with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
        save_checkpoint(tmp_path, 2, _tensors(2), {}, keep_last=1)
    assert latest_checkpoint(tmp_path) == good
    assert json.loads((good / "manifest.json").read_text())["step"] == 1
