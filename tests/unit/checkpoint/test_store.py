"""The checkpoint folder: atomic, complete or refused, newest found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from swinmoe.checkpoint import (
    Content,
    Saver,
    drop_newer,
    hold,
    is_complete,
    latest_checkpoint,
    load_checkpoint,
    open_checkpoint,
)
from swinmoe.checkpoint.tensor_file import TensorWriter
from swinmoe.errors import CheckpointError, DamagedError
from swinmoe.parallel import Mesh


def _content(value: float) -> Content:
    groups = {"model": {"w": torch.full((2, 3), value)}, "optimizer": {"w#exp_avg": torch.full((2, 3), -value)}}
    return Content({name: hold(tensors, {}) for name, tensors in groups.items()}, f"value: {value}\n")


def _save(folder: Path, step: int, *, score: float | None = None, **options: Any) -> Path:
    saver = Saver(folder, Mesh(), **{"keep_last": 9} | options)
    saver.save(step, {"a": _content(step)}, {"seed": 4}, score)
    saver.finish()
    return folder / f"step-{step:08d}"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bit_equal_and_other_tools_can_read_it(tmp_path: Path, asynchronous: bool) -> None:
    tensors = {"w": torch.randn(5, 7, dtype=torch.float64), "t": torch.randn(3, 4).t(), "n": torch.tensor(3)}
    tensors |= {"half": torch.randn(3).bfloat16(), "none": torch.empty(0, 2), "flag": torch.tensor([True, False])}
    saver = Saver(tmp_path, Mesh(), keep_last=1, asynchronous=asynchronous)
    saver.save(12, {"a": Content({"model": hold(tensors, {})}, "x: 1\n")}, {"seed": 4}, 0.5)
    for tensor in tensors.values():
        tensor.zero_()  # training goes on: what was handed over is what is saved
    expected: dict[str, Tensor] = {}
    saver.finish()
    back = load_checkpoint(tmp_path / "step-00000012")
    assert back.step == 12 and back.state["seed"] == 4 and back.state["score"] == 0.5
    torch.manual_seed(0)
    expected = {"w": torch.randn(5, 7, dtype=torch.float64), "t": torch.randn(3, 4).t(), "n": torch.tensor(3)}
    expected |= {"half": torch.randn(3).bfloat16(), "none": torch.empty(0, 2), "flag": torch.tensor([True, False])}
    theirs = load_file(back.path / "model-00001-of-00001.safetensors")
    index = json.loads((back.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(back.tensors["model"][name], tensor) and torch.equal(theirs[name], tensor), name
        assert index["weight_map"][name] == "model-00001-of-00001.safetensors"
    assert (back.path / "config.yaml").read_text() == "x: 1\n"


def test_several_arms_have_folders_of_their_own(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Mesh(), keep_last=1)
    saver.save(1, {"dense": _content(1.0), "sparse": _content(2.0)}, {}, None)
    back = load_checkpoint(tmp_path / "step-00000001")
    assert set(back.tensors) == {"dense/model", "dense/optimizer", "sparse/model", "sparse/optimizer"}
    assert back.tensors["sparse/model"]["w"][0, 0] == 2
    assert back.state["folders"] == {"dense": "dense/", "sparse": "sparse/"}


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        assert _save(tmp_path, step, keep_last=2).is_dir()  # what was just written is never the one to go
    assert _names(tmp_path) == ["latest", "step-00000003", "step-00000010"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-00000010"
    assert drop_newer(tmp_path, 3) == []
    assert _names(tmp_path) == ["latest", "step-00000003"]
    _save(tmp_path, 4, keep_last=1)
    assert _names(tmp_path) == ["latest", "step-00000004"]


def test_keeps_the_best_too(tmp_path: Path) -> None:
    for step, score in enumerate([0.3, 0.9, None, 0.5, 0.9, 0.1, None], start=1):
        _save(tmp_path, step, score=score, keep_last=1, keep_best=2)
    assert _names(tmp_path) == ["latest", "step-00000002", "step-00000005", "step-00000007"]


def test_unfinished_and_truncated_are_passed_over(tmp_path: Path) -> None:
    good, cut = _save(tmp_path, 1), _save(tmp_path, 2)
    file = cut / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / ".writing-step-00000003").mkdir()
    bare = tmp_path / "step-00000004"
    bare.mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(DamagedError, match=r"model-00001-of-00001\.safetensors' is damaged: it has \d+ bytes, and the"):
        load_checkpoint(cut)
    with pytest.raises(DamagedError, match=r"not a complete checkpoint: it has no manifest\.json"):
        load_checkpoint(bare)
    assert drop_newer(tmp_path, 1) == [tmp_path / "damaged-step-00000002", tmp_path / "damaged-step-00000004"]
    assert _names(tmp_path) == [
        ".writing-step-00000003",
        "damaged-step-00000002",
        "damaged-step-00000004",
        "latest",
        "step-00000001",
    ]
    _save(tmp_path, 5)
    assert ".writing-step-00000003" not in _names(tmp_path)


def test_every_byte_counts(tmp_path: Path) -> None:
    """Flip one bit in every 7th byte of every file: each is noticed, and the message names the file."""
    path = _save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        for position in range(0, len(sound), 7):
            data = bytearray(sound)
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            with pytest.raises(CheckpointError) as said:
                load_checkpoint(path)
            assert file.name in str(said.value), (file.name, position)
        file.write_bytes(sound)
    load_checkpoint(path)


def test_a_flipped_bit_is_found_in_its_tensor(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    file = path / "optimizer-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert is_complete(path)  # a look at sizes does not see it
    said = r"optimizer-00001-of-00001\.safetensors' is damaged: tensor 'w#exp_avg' is not what was written"
    with pytest.raises(DamagedError, match=said):
        load_checkpoint(path)
    with pytest.raises(DamagedError, match=said):
        open_checkpoint(path).verify()
    open_checkpoint(path).tensors("model").verify()


def test_a_checkpoint_of_the_first_format_says_so(tmp_path: Path) -> None:
    old = tmp_path / "step-00000001"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": {"state.json": [3, "ab"]}}))
    with pytest.raises(CheckpointError, match=r"format 1.*reads format 2") as said:
        open_checkpoint(old)
    assert not isinstance(said.value, DamagedError)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", ["mkdir", "write", "close", "manifest"])
def test_a_failed_write_leaves_the_previous_one(
    tmp_path: Path, failing: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = _save(tmp_path, 1, keep_last=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if failing == "mkdir":
            (tmp_path / ".writing-step-00000002").symlink_to("/proc/none")
            broken.setattr(os, "mkdir", full)
        elif failing == "manifest":
            broken.setattr("swinmoe.checkpoint.saver.write_text", full)
        else:
            broken.setattr(TensorWriter, failing, full)
        with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are intact"):
            _save(tmp_path, 2, keep_last=1, asynchronous=asynchronous)
    assert latest_checkpoint(tmp_path) == good and load_checkpoint(good).step == 1
    assert _names(tmp_path) == ["latest", "step-00000001"]
    _save(tmp_path, 2, keep_last=1, asynchronous=asynchronous)
    assert _names(tmp_path) == ["latest", "step-00000002"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", ["tensor 'w'", "its header", "bringing it to the disk"])
def test_a_full_disk_names_file_and_tensor(
    tmp_path: Path, what: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int, data: Any = b"", at: int = 0) -> int:
        if what == "bringing it to the disk" or (at == 0) == (what == "its header"):
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(os, "fsync" if "disk" in what else "pwrite", full)
    with pytest.raises(CheckpointError, match=rf"No space left.*{what}.*/model-00001-of-00001\.safetensors'; earlier"):
        _save(tmp_path, 2, asynchronous=asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_whatever_goes_wrong_while_publishing_is_said(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background too: a checkpoint that is not there must not pass for one that is."""
    good = _save(tmp_path, 1)

    def broken(*_: object) -> None:
        raise TypeError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr("swinmoe.checkpoint.saver.write_text", broken)
        with pytest.raises(CheckpointError, match=r"step-00000002': a mistake of ours; .*this is a TypeError"):
            _save(tmp_path, 2, asynchronous=asynchronous)
    assert latest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("asynchronous", [False, True])
def test_old_checkpoints_that_stay_are_no_failure_to_write(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("swinmoe.checkpoint.saver._discard", refused)
    with pytest.warns(RuntimeWarning, match=r"step-00000002' is saved, but older .*Permission denied.*step-00000001"):
        new = _save(tmp_path, 2, keep_last=1, asynchronous=asynchronous)
    assert latest_checkpoint(tmp_path) == new and load_checkpoint(new).step == 2
