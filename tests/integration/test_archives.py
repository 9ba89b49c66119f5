"""A run on archives is the run on the class folder that they were made of, to the last bit of the weights."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from swinmoe.checkpoint import latest_checkpoint
from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.train import train

RUN: dict[str, Any] = {
    "model": {
        "preset": "swin_moe_micro",
        "embed_dim": 16,
        "patch_size": 4,
        "num_heads": [1, 2],
        "num_classes": 2,
        "moe": {"num_experts": 4},
    },
    "data": {"image_size": 32, "augment": {"random_resized_crop": [0.5, 1.0], "horizontal_flip": 0.5}},
    "train": {"steps": 5, "epochs": None, "batch_size": 8, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 5, "peak_flops": 1e11},
}


def _make(root: Path) -> None:
    """root/folder, root/zip and root/tar with the same 16 training and 4 evaluation images."""
    rng = np.random.default_rng(0)
    for name in ("folder", "zip", "tar"):
        (root / name).mkdir()
    for split, count in (("train", 8), ("val", 2)):
        lines = []
        with (
            zipfile.ZipFile(root / "zip" / f"{split}.zip", "w") as packed,
            tarfile.open(root / "tar" / f"{split}-0.tar", "w") as shard,
        ):
            for label in range(2):
                folder = root / "folder" / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    path = folder / f"{number}.jpeg"
                    shade = rng.integers(0, 128, (40, 36, 3), dtype=np.uint8) + np.uint8(100 * label)
                    Image.fromarray(shade).save(path)
                    packed.write(path, f"class{label}/{number}.jpeg")
                    lines.append(f"class{label}/{number}.jpeg\t{label}\n")
                    (root / "label").write_text(str(label))
                    shard.add(path, f"{label}{number}.jpeg")
                    shard.add(root / "label", f"{label}{number}.cls")
        (root / "zip" / f"{split}_map.txt").write_text("".join(lines))


def _weights(root: Path, name: str, workers: int) -> dict[str, torch.Tensor]:
    data = {**RUN["data"], "name": name, "root": str(root / name), "workers": workers}
    run = build(RunConfig, {**RUN, "data": data, "name": name, "output_dir": str(root / "runs")})
    path, *_ = train(run, show=False)
    latest = latest_checkpoint(Path(path) / "checkpoints")
    assert latest is not None
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(latest.rglob("model*.safetensors")):
        tensors |= load_file(file)
    assert tensors
    return tensors


def test_zip_and_tar_train_the_weights_that_the_folder_does(tmp_path: Path) -> None:
    _make(tmp_path)
    expected = _weights(tmp_path, "folder", 0)
    for name, workers in (("zip", 0), ("tar", 2)):
        found = _weights(tmp_path, name, workers)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
