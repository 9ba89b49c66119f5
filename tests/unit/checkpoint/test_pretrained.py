"""Models alone: there and back, by the folder, by a run, by other tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import swinmoe
from swinmoe import create_model, from_pretrained, save_pretrained
from swinmoe.checkpoint import read_model
from swinmoe.checkpoint.naming import to_model
from swinmoe.errors import CheckpointError, DamagedError

SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": (1, 2), "num_classes": 5}


@pytest.fixture
def model() -> swinmoe.SwinTransformer:
    return create_model("swin_moe_micro", seed=3, **SMALL).eval()


def test_there_and_back(model: swinmoe.SwinTransformer, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    folder = save_pretrained(model, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    back = from_pretrained(folder)
    assert back.config == model.config and not back.training
    own, theirs = back.state_dict(), model.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    images = torch.rand(2, model.in_chans, *model.img_size)
    assert torch.equal(back(images).logits, model(images).logits)
    files = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in to_model(files).items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "swinmoe"
    assert from_pretrained(folder, drop_path_rate=0.5).config.drop_path_rate == 0.5
    save_pretrained(create_model("swin_moe_micro", seed=4, **SMALL), folder)  # over it
    assert not torch.equal(from_pretrained(folder).head.weight, model.head.weight)


def test_float64_stays(model: swinmoe.SwinTransformer, tmp_path: Path) -> None:
    save_pretrained(model.double(), tmp_path)
    assert from_pretrained(tmp_path).head.weight.dtype == torch.float64


def test_several_files_have_an_index(
    model: swinmoe.SwinTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swinmoe.checkpoint.spread.SHARD_BYTES", 20_000)
    save_pretrained(model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == set(read_model(tmp_path))
    assert torch.equal(from_pretrained(tmp_path).head.weight, model.head.weight)
    (tmp_path / "manifest.json").unlink()  # as from another program
    assert torch.equal(from_pretrained(tmp_path).head.weight, model.head.weight)
    index["weight_map"]["head.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedError, match="not a file of that folder"):
        read_model(tmp_path)


def test_what_is_wrong_is_said(model: swinmoe.SwinTransformer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a preset"):
        from_pretrained("swin_moe_micro")
    with pytest.raises(CheckpointError, match=r"'.*nothing' does not exist"):
        from_pretrained(tmp_path / "nothing")
    folder = save_pretrained(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"does not fit this config: it has other shapes of head\.weight"):
        from_pretrained(folder, num_classes=6)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors' is damaged: tensor '.*' is not what was written"):
        from_pretrained(folder)
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match="looks like a pickle"):
        read_model(tmp_path / "model.safetensors")


def test_the_hub_is_asked_for_names(
    model: swinmoe.SwinTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pretrained(model, tmp_path / "fetched")
    asked = []

    def fetch(name: str, **_: Any) -> str:
        asked.append(name)
        if name == "somebody/nothing":
            raise ConnectionError("offline")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert torch.equal(from_pretrained("somebody/swin").head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match=r"no folder here, and the Hugging Face hub did not give it \(offline\)"):
        from_pretrained("somebody/nothing")
    assert asked == ["somebody/swin", "somebody/nothing"]


@pytest.mark.parametrize("at", ["pwrite", "fsync", "replace"])
def test_over_another_model_on_a_full_disk(
    model: swinmoe.SwinTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """What was there is still there, whole, unless it was the very renaming that failed; nothing half written stays."""
    folder = save_pretrained(model, tmp_path)
    names = sorted(path.name for path in folder.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, at, full)
        with pytest.raises(CheckpointError, match=r"could not write the model to .*No space left on device"):
            save_pretrained(create_model("swin_moe_micro", seed=4, **SMALL), folder)
    left = sorted(path.name for path in folder.iterdir())
    if at == "replace":  # the manifest went first: the old model vouches for itself no more
        assert left == [name for name in names if name != "manifest.json"]
    else:
        assert left == names
    assert torch.equal(from_pretrained(folder).head.weight, model.head.weight)


def test_no_file_of_an_earlier_model_stays_beside_a_new_one(
    model: swinmoe.SwinTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sorted(path.name for path in save_pretrained(model, tmp_path / "one").iterdir())
    with monkeypatch.context() as small:
        small.setattr("swinmoe.checkpoint.spread.SHARD_BYTES", 20_000)
        several = sorted(path.name for path in save_pretrained(model, tmp_path / "several").iterdir())
        save_pretrained(model, tmp_path / "both")
    save_pretrained(model, tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == one
    with monkeypatch.context() as small:
        small.setattr("swinmoe.checkpoint.spread.SHARD_BYTES", 20_000)
        save_pretrained(model, tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == several
