"""Huge pages: asked for where they belong, and nothing but the pages' size changes."""

import ctypes
import errno
import mmap
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from swinmoe.config import MoEConfig
from swinmoe.moe import MoEMlp, gradient_buffers
from swinmoe.moe.types import ExpertWeights
from swinmoe.native import expert_mlp_forward, huge_pages, use_huge_pages, why_no_kernels


@pytest.fixture(autouse=True)
def there_are_some(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(huge_pages.SWITCH, raising=False)
    monkeypatch.setattr(huge_pages, "_none_left", False)
    huge_pages._size.cache_clear()
    if not huge_pages._size():
        pytest.skip("this system gives no huge pages to those who ask")
    yield
    huge_pages._size.cache_clear()


def flags(t: Tensor) -> set[str]:
    """What Linux has noted of the mapping in which the middle of `t` lies."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) <= middle < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("not mapped at all")


def large(size: int = 0) -> Tensor:
    """In a mapping of its own, whatever the allocator does."""
    size = size or 40 * 2**20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.arange(size // 4, out=torch.frombuffer(memory, dtype=torch.float32))


def test_memory_asks_and_keeps_its_numbers():
    t = large()
    assert "hg" not in flags(t)
    assert use_huge_pages(t)
    assert "hg" in flags(t)
    assert torch.equal(t, large())


@pytest.mark.parametrize("error, again", [(errno.EINVAL, True), (errno.ENOMEM, False), (errno.EAGAIN, False)])
def test_where_no_huge_page_is_left_nobody_looks_for_one_again(error, again, monkeypatch):
    asked = []

    def madvise(begin: object, size: object, advice: int) -> int:
        asked.append(advice)
        ctypes.set_errno(error)
        return -1 if advice == huge_pages._COLLAPSE else 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: madvise)
    for _ in range(2):
        assert use_huge_pages(large())
    assert asked == [huge_pages._HUGEPAGE, huge_pages._COLLAPSE, huge_pages._HUGEPAGE] + [huge_pages._COLLAPSE] * again


def test_only_whole_pages_inside_the_tensor_are_asked_for(monkeypatch):
    size = huge_pages._size()
    ranges = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *where: ranges.append(where) or 0)
    whole = large(10 * size)
    for begin, end in ((1, 3 * size // 4 + 7), (5, size), (size // 2, 2 * size + 3)):
        part = whole[begin:end]
        use_huge_pages(part)
        for first, length, _ in ranges:
            assert first.value % size == length.value % size == 0 < length.value
            assert part.data_ptr() <= first.value
            assert first.value + length.value <= part.data_ptr() + part.nbytes
        assert ranges or part.nbytes < 2 * size
        ranges.clear()


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_little_memory_has_nothing_to_ask(numel):
    assert not use_huge_pages(torch.zeros(numel))


def test_a_file_keeps_its_numbers_and_raises_nothing(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(large().numpy().tobytes())
    for shared in (False, True):
        mapped = torch.from_file(str(path), shared=shared, size=large().numel())
        use_huge_pages(mapped)
        assert torch.equal(mapped, large())


def test_what_the_system_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *where: -1)
    assert not use_huge_pages(large())


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_a_system_that_gives_none_is_not_asked(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    huge_pages._size.cache_clear()
    assert not use_huge_pages(large())


def test_a_variable_switches_it_off(monkeypatch):
    monkeypatch.setenv(huge_pages.SWITCH, "0")
    huge_pages._size.cache_clear()
    t = large()
    assert not use_huge_pages(t)
    assert "hg" not in flags(t)


@pytest.mark.skipif(bool(why_no_kernels()), reason="no kernel of ours here")
def test_experts_weights_and_their_gradients_lie_in_huge_pages():
    layer = MoEMlp(MoEConfig(num_experts=8), dim=512, hidden_dim=2560)  # 40 MB a matrix
    weights = [layer.experts.fc1_weight, layer.experts.fc2_weight]
    before = [w.detach().clone() for w in weights]
    x = torch.randn(16, 512)
    layer(x)[0].sum().backward()
    for weight, old in zip(weights, before, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight, old)
        assert "hg" in flags(weight)
        assert "hg" in flags(weight.grad)
        kept = gradient_buffers.kept(weight)
        assert kept is not None and kept.data_ptr() == weight.grad.data_ptr()


@pytest.mark.skipif(bool(why_no_kernels()), reason="no kernel of ours here")
def test_weights_made_for_one_pass_stay_where_they_are():
    experts = MoEMlp(MoEConfig(num_experts=8), dim=512, hidden_dim=2560).experts
    own = [large().requires_grad_().view(8, *shape) for shape in ((2560, 512), (512, 2560))]
    out = experts.function(True)(torch.zeros(16, 512), torch.full((1, 8), 2), ExpertWeights(own[0], None, own[1], None))
    assert out.shape == (16, 512)
    assert not any("hg" in flags(w) for w in own)


@pytest.mark.skipif(bool(why_no_kernels()), reason="no kernel of ours here")
def test_pre_activations_lie_in_huge_pages():
    fc1, fc2 = torch.randn(1, 512, 8), torch.randn(1, 8, 512)
    _, pre = expert_mlp_forward(torch.randn(8192, 8), [[8192]], fc1, None, fc2, None, "relu", True)
    assert all("hg" in flags(piece) for piece in pre)
