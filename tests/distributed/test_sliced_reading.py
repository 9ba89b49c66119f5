"""Experts in slices, and tensors in rows, read back: each byte once over all ranks, and every one of them checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pool import Pool
from torch import Tensor

from swinmoe.checkpoint import Content, Held, Saver, Stack, hold, open_checkpoint, read_held
from swinmoe.errors import DamagedError
from swinmoe.parallel import Cut, Mesh

pytestmark = pytest.mark.distributed

AXES = {"fc1_weight": 0, "fc1_bias": 0, "fc2_weight": 1}
"""Axis of one expert's tensor along which it is cut."""
SLICED = 2
ROWS = 1001
"""Not the same for both ranks."""


def _state() -> dict[str, Tensor]:
    """About 20 MB: one expert in each of two layers, and two tensors that are cut by rows."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"fc1_weight": (1, 4096, 256), "fc1_bias": (1, 4096), "fc2_weight": (1, 256, 4096)}
    state = {
        f"{layer}.experts.{key}": torch.randn(size, generator=draw) for layer in "ab" for key, size in shapes.items()
    }
    return state | {f"{layer}.rows": torch.randn(ROWS, 512, generator=draw) for layer in "ab"}


def _save(folder: Path) -> Path:
    state = _state()
    found = {name: Stack(1) for name in state if ".experts." in name}
    Saver(folder, Mesh(), keep_last=1).save(1, {"a": Content({"model": hold(state, found)}, "{}\n")}, {}, None)
    return folder / "step-00000001"


def read(path: Path) -> tuple[int, int, bool | str]:
    """Bytes held and read by this rank of two, and whether they are what was saved; or the error."""
    rank = torch.distributed.get_rank()
    mesh = Mesh(rank=rank, world=2, ep_size=2, ep_rank=rank, ep_group=torch.distributed.group.WORLD)
    held, expected = {}, {}
    share = -(-ROWS // 2)
    for name, whole in _state().items():
        key = name.rpartition(".")[2]
        if key in AXES:
            part = whole.chunk(SLICED, AXES[key] + 1)[rank].contiguous()
            held[name] = Held(torch.empty_like(part), Stack(1, spread=True, slices=SLICED, axis=AXES[key]))
        else:
            part = whole[rank * share : (rank + 1) * share]
            held[name] = Held(torch.empty_like(part), cut=Cut(ROWS, share, rank * share))
        expected[name] = part
    source = open_checkpoint(path).tensors("model")
    try:
        read_held(held, source, mesh)
        source.settle()
    except DamagedError as error:
        return 0, 0, str(error)
    equal = all(torch.equal(held[name].tensor, part) for name, part in expected.items())
    return sum(part.nbytes for part in expected.values()), source.bytes_read, equal


def test_a_rank_reads_no_more_than_its_share(tmp_path: Path, pool2: Pool) -> None:
    for own, bytes_read, equal in pool2.run(read, _save(tmp_path)):
        assert equal is True
        assert own > 9e6 and bytes_read <= 1.01 * own, (own, bytes_read)


@pytest.mark.parametrize("name", ["a.experts.0.fc1.weight", "b.experts.0.fc2.weight", "b.rows"])
def test_a_flipped_bit_is_found_by_whoever_reads_it(tmp_path: Path, pool2: Pool, name: str) -> None:
    """And nobody is left waiting: the same ranks read the sound file afterwards."""
    path = _save(tmp_path)
    [file] = path.glob("model-*.safetensors")
    entry = open_checkpoint(path).tensors("model").entry(name)
    sound = file.read_bytes()
    at = entry.start + entry.nbytes // 2
    file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    said = [told for _, _, told in pool2.run(read, path)]
    [error] = [told for told in said if told is not True and told is not False]
    assert f"{file.name}' is damaged: tensor '{name}' is not what was written" in error
    file.write_bytes(sound)
    assert all(equal is True for _, _, equal in pool2.run(read, path))
