"""Huge pages: asked for where they belong, and nothing but the pages' size changes."""

import ctypes
import errno
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinmoe.config import MoEConfig
from swinmoe.moe import MoEMlp, gradient_buffers
from swinmoe.moe.types import ExpertWeights
from swinmoe.native import expert_mlp_forward, huge_pages, use_huge_pages, why_no_kernels

MB = 2**20


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch, tmp_path):
    """As on a machine with huge pages of 2 MB, whatever this one has."""
    monkeypatch.delenv(huge_pages.SWITCH, raising=False)
    monkeypatch.setattr(huge_pages, "_none_left", False)
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "hpage_pmd_size").write_text(str(2 * MB))
    huge_pages._size.cache_clear()
    yield
    huge_pages._size.cache_clear()


there_are_some = pytest.mark.skipif(
    huge_pages._size() != 2 * MB, reason="this system gives no huge pages of 2 MB to those who ask"
)
kernels = pytest.mark.skipif(bool(why_no_kernels()), reason="no kernel of ours here")


@pytest.fixture
def advices(monkeypatch):
    """What is asked of the system, which says yes to all."""
    asked: list[tuple[int, int, int]] = []

    def madvise(begin: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
        asked.append((begin.value or 0, size.value, advice))
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: madvise)
    return asked


def mappings() -> list[tuple[int, int, set[str]]]:
    """Begin, end and flags of this process's."""
    found, begin, end = [], 0, 0
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                begin, end = int(place[1], 16), int(place[2], 16)
            elif line.startswith("VmFlags:"):
                found.append((begin, end, set(line.split()[1:])))
    return found


def asked_for(t: Tensor) -> bool:
    """Whether the mapping in which the middle of `t` lies has asked for huge pages."""
    middle = t.data_ptr() + t.nbytes // 2
    (flags,) = [flags for begin, end, flags in mappings() if begin <= middle < end]
    return "hg" in flags


def large(size: int = 40 * MB) -> Tensor:
    """In a mapping of its own, whatever the allocator does."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.arange(size // 4, out=torch.frombuffer(memory, dtype=torch.float32))


@there_are_some
@pytest.mark.parametrize("move", [True, False])
def test_memory_asks_and_keeps_its_numbers(move):
    t = large()
    assert not asked_for(t)
    assert use_huge_pages(t, move=move)
    assert asked_for(t)
    assert torch.equal(t, large())


def test_memory_that_is_about_to_be_written_does_not_move(advices):
    assert use_huge_pages(large(), move=False)
    assert [advice for *_, advice in advices] == [huge_pages._HUGEPAGE]


def test_a_tensor_moves_once_a_minute(advices, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(huge_pages.time, "monotonic", lambda: now[0])
    t = large()

    def asked() -> list[int]:
        advices.clear()
        assert use_huge_pages(t, move=True)
        return [advice for *_, advice in advices]

    both = [huge_pages._HUGEPAGE, huge_pages._COLLAPSE]
    assert asked() == both
    assert asked() == []
    now[0] += 59
    t.data = large()  # elsewhere, as weights that are gathered anew for each step
    assert asked() == [huge_pages._HUGEPAGE]
    assert asked() == []
    now[0] += 2
    assert asked() == both


@pytest.mark.parametrize(
    "error, again", [(errno.EINVAL, True), (errno.EAGAIN, True), (errno.ENOMEM, False), (errno.EBUSY, False)]
)
def test_where_no_huge_page_is_left_nobody_looks_for_one_again(error, again, monkeypatch):
    asked = []

    def madvise(begin: object, size: object, advice: int) -> int:
        asked.append(advice)
        ctypes.set_errno(error)
        return -1 if advice == huge_pages._COLLAPSE else 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: madvise)
    for _ in range(2):
        assert use_huge_pages(large(), move=True)
    assert asked == [huge_pages._HUGEPAGE, huge_pages._COLLAPSE, huge_pages._HUGEPAGE] + [huge_pages._COLLAPSE] * again


def test_only_whole_pages_inside_the_tensor_are_asked_for(advices):
    size = 2 * MB
    whole = large(10 * size)
    for begin, end in ((1, 3 * size // 4 + 7), (5, size), (size // 2, 2 * size + 3)):
        part = whole[begin:end]
        use_huge_pages(part, move=True)
        for first, length, _ in advices:
            assert first % size == length % size == 0 < length
            assert part.data_ptr() <= first
            assert first + length <= part.data_ptr() + part.nbytes
        assert advices or part.nbytes < 2 * size
        advices.clear()


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_little_memory_has_nothing_to_ask(numel, advices):
    assert not use_huge_pages(torch.zeros(numel), move=True)
    assert not advices


def test_memory_that_processes_share_is_left_alone(tmp_path, advices):
    path = tmp_path / "weights"
    path.write_bytes(large().numpy().tobytes())
    for shared in (torch.from_file(str(path), shared=True, size=10 * MB), torch.ones(10 * MB).share_memory_()):
        assert not use_huge_pages(shared, move=True)
    assert not advices


def test_a_private_file_keeps_its_numbers(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(large().numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=10 * MB)
    use_huge_pages(mapped, move=True)
    assert torch.equal(mapped, large())


def test_what_the_system_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *where: -1)
    assert not use_huge_pages(large(), move=True)


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_a_system_that_gives_none_is_not_asked(setting, tmp_path, monkeypatch, advices):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(huge_pages, "_SETTINGS", empty)
    if setting is not None:
        (empty / "enabled").write_text(setting)
        (empty / "hpage_pmd_size").write_text("2097152")
    huge_pages._size.cache_clear()
    assert not use_huge_pages(large(), move=True)
    assert not advices


def test_a_variable_switches_it_off(monkeypatch, advices):
    monkeypatch.setenv(huge_pages.SWITCH, "0")
    huge_pages._size.cache_clear()
    assert not use_huge_pages(large(), move=True)
    assert not advices


@kernels
@there_are_some
def test_experts_weights_and_their_gradients_lie_in_huge_pages():
    layer = MoEMlp(MoEConfig(num_experts=8), dim=512, hidden_dim=2560)  # 40 MB a matrix
    weights = [layer.experts.fc1_weight, layer.experts.fc2_weight]
    before = [w.detach().clone() for w in weights]
    x = torch.randn(16, 512)
    layer(x)[0].sum().backward()
    for weight, old in zip(weights, before, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight, old)
        assert asked_for(weight)
        assert asked_for(weight.grad)
        kept = gradient_buffers.kept(weight)
        assert kept is not None and kept.data_ptr() == weight.grad.data_ptr()


@kernels
@pytest.mark.parametrize("training", [True, False])
def test_only_parameters_move_and_only_in_training(training, advices):
    layer = MoEMlp(MoEConfig(num_experts=8), dim=512, hidden_dim=2560)
    own = layer.experts.weights()
    cut = ExpertWeights(own.fc1 * 1, own.b1, own.fc2 * 1, own.b2)
    function, counts, rows = layer.experts.function(True), torch.full((1, 8), 2), torch.zeros(16, 512)
    with torch.set_grad_enabled(training):
        function(rows, counts, cut)
        assert not advices  # what was made for this pass would move with each
        function(rows, counts, own)
    assert [advice for *_, advice in advices].count(huge_pages._COLLAPSE) == 2 * training
    assert [advice for *_, advice in advices].count(huge_pages._HUGEPAGE) == 2


@kernels
def test_gradient_memory_that_a_fork_has_split_moves_again(advices, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(huge_pages.time, "monotonic", lambda: now[0])
    layer = MoEMlp(MoEConfig(num_experts=8), dim=512, hidden_dim=2560)
    moves = []
    for _ in range(3):
        layer.zero_grad()
        layer(torch.randn(16, 512))[0].sum().backward()
        moves.append([advice for *_, advice in advices].count(huge_pages._COLLAPSE))
        now[0] += 40
    assert moves == [4, 4, 8]  # weights and their gradients


@kernels
@there_are_some
def test_pre_activations_lie_in_huge_pages():
    fc1, fc2 = torch.randn(1, 512, 8), torch.randn(1, 8, 512)
    _, pre = expert_mlp_forward(torch.randn(8192, 8), [[8192]], fc1, None, fc2, None, "relu", True)
    assert all(asked_for(piece) for piece in pre)


_ROOM = """
import sys
sys.path.insert(0, {folder!r})
import torch
from test_huge_pages import expert_mlp_forward, mappings

torch.set_num_threads(1)
fc1, fc2 = torch.randn(1, 4096, 64), torch.randn(1, 64, 4096)
expert_mlp_forward(torch.randn(700, 64), [[700]], fc1, None, fc2, None, "relu", False)
print(sum(end - begin for begin, end, flags in mappings() if "hg" in flags))
"""


@kernels
@there_are_some
@pytest.mark.parametrize("switch", ["1", "0"])
def test_working_memory_lies_in_huge_pages(switch, monkeypatch):
    monkeypatch.setenv(huge_pages.SWITCH, switch)
    words = [sys.executable, "-c", _ROOM.format(folder=str(Path(__file__).parent))]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    assert (int(done.stdout) > 0) == (switch == "1")
