"""What is read of a file, counted; and how much memory saving and loading take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinmoe.checkpoint import Content, Held, Saver, Stack, hold, open_checkpoint, read_held
from swinmoe.checkpoint.tensor_file import Band
from swinmoe.parallel import Mesh

EXPERTS = 8


def _saved(folder: Path) -> dict[str, Tensor]:
    """About 20 MB, nearly all of it experts'."""
    shapes = {"fc1_weight": (EXPERTS, 1024, 256), "fc1_bias": (EXPERTS, 1024), "fc2_weight": (EXPERTS, 256, 1024)}
    state = {f"mlp.experts.{key}": torch.randn(size) for key, size in shapes.items()} | {"norm.weight": torch.randn(64)}
    found = {name: Stack(EXPERTS) for name in state if ".experts." in name}
    Saver(folder, Mesh(), keep_last=1).save(1, {"a": Content({"model": hold(state, found)}, "{}\n")}, {}, None)
    return state


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_share_of_the_experts_costs_no_more_than_its_bytes(tmp_path: Path, ranks: int) -> None:
    """By the count of this program, and by that of the system."""
    state = _saved(tmp_path)
    for rank in range(ranks):
        mesh = Mesh(rank=rank, world=ranks, ep_size=ranks, ep_rank=rank)
        held, expected = {}, {}
        for name, whole in state.items():
            sparse = ".experts." in name
            expected[name] = whole.chunk(ranks)[rank] if sparse else whole
            held[name] = Held(torch.zeros_like(expected[name]), Stack(EXPERTS, spread=True) if sparse else None)
        own = sum(part.nbytes for part in expected.values())
        stored, before = open_checkpoint(tmp_path / "step-00000001"), _by_system()
        source = stored.tensors("model")
        read_held(held, source, mesh)
        source.settle()
        assert all(torch.equal(held[name].tensor, part) for name, part in expected.items())
        assert own < source.bytes_read <= 1.01 * own, (own, source.bytes_read)
        assert _by_system() - before <= 1.01 * own


@pytest.mark.parametrize(("key", "axis"), [("fc1.weight", 0), ("fc2.weight", 1)])
def test_a_band_of_the_hidden_width_costs_its_bytes(tmp_path: Path, key: str, axis: int) -> None:
    state = _saved(tmp_path)
    source = open_checkpoint(tmp_path / "step-00000001").tensors("model")
    opened = source.bytes_read
    whole = state[f"mlp.experts.{key.replace('.', '_')}"][3]
    out = torch.empty_like(whole.narrow(axis, 512, 256), memory_format=torch.contiguous_format)
    source.read_into(f"mlp.experts.3.{key}", out, Band(axis, 512, 256))
    assert torch.equal(out, whole.narrow(axis, 512, 256))
    assert source.bytes_read - opened == out.nbytes


MEASURED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import measure_checkpoint
measure_checkpoint.EXPERTS, measure_checkpoint.DIM, measure_checkpoint.HIDDEN = 4, 256, 1024
measure_checkpoint.memory(Path(sys.argv[2]), 0.1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of the resident set")
def test_peak_memory_stays_within_its_bounds(tmp_path: Path) -> None:
    """Of 100 MB, each way in a process of its own."""
    folder = Path(__file__).parents[2] / "integration"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"peak of (.+): ([\d.]+) x the state", done.stdout))
    assert 1.0 <= float(found["save"]) <= 1.2 and 1.0 <= float(found["load"]) <= 1.2, found
    assert 1.9 <= float(found["asynchronous save"]) <= 2.2, found


def _by_system() -> int:
    """Bytes that this process has asked for, where the system counts them."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return 0
    return next(int(line.split()[1]) for line in counts.read_text().splitlines() if line.startswith("rchar"))
