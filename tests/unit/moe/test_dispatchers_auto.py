"""What `auto` takes, that it says so, and that ranks which differ only in having Tutel exchange the same shapes."""

import itertools
import logging
import sys

import pytest
import torch

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig
from swinmoe.errors import BackendUnavailableError
from swinmoe.moe import MoEMlp
from swinmoe.moe.dispatchers import auto, choose, tutel

KINDS = ("fixed", "bounded", "dropless")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make(kind: str = "dropless", **where) -> MoEMlp:
    capacity = CapacityConfig(train=CapacityPolicy(kind=kind, factor=1.0))
    cfg = MoEConfig(num_experts=4, top_k=2, dispatcher="auto", capacity=capacity)
    return MoEMlp(cfg, dim=4, hidden_dim=6, init_std=1.0, **where)


@pytest.fixture
def no_tutel(monkeypatch: pytest.MonkeyPatch):
    """As if Tutel were not installed, also where it is."""
    monkeypatch.setitem(sys.modules, "tutel", None)
    monkeypatch.setitem(sys.modules, "tutel.moe", None)
    tutel.tutel_serves.cache_clear()
    yield
    tutel.tutel_serves.cache_clear()


def test_the_table_of_choices():
    assert {choose("cpu", dtype, kind, tutel=t)[0] for dtype in DTYPES for kind in KINDS for t in (True, False)} == {
        "ragged"
    }
    for dtype, kind, there in itertools.product(DTYPES, KINDS, (True, False)):
        name, reason = choose("cuda", dtype, kind, tutel=there)
        if kind != "fixed":
            assert name == "ragged"
        elif there and dtype == torch.float32:
            assert name == "tutel"
        else:
            assert name == "padded"
        assert "never timed on a GPU" in reason


def test_the_layout_never_depends_on_tutel():
    """Or ranks with and without it would call different collectives."""
    for device, dtype, kind in itertools.product(("cpu", "cuda", "meta"), DTYPES, KINDS):
        layouts = {choose(device, dtype, kind, tutel=there)[0] == "ragged" for there in (True, False)}
        assert len(layouts) == 1
        assert len({choose(device, other, kind, tutel=True)[0] == "ragged" for other in DTYPES}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_the_ragged_layer(kind):
    layer, x = make(kind), torch.randn(9, 4)
    twin = MoEMlp(MoEConfig(num_experts=4, top_k=2, capacity=layer.cfg.capacity), dim=4, hidden_dim=6, init_std=1.0)
    assert torch.equal(layer(x)[0], twin(x)[0])


def test_off_the_cpu_with_fixed_capacity_it_is_padded_and_never_asks_for_data(no_tutel):
    layer = make("fixed", device="meta")
    x = torch.empty(9, 4, device="meta")
    _, plan, _, _ = layer.assign(x, None)
    assert plan.slots == 2 * 3
    y, stats = layer(x)
    (y.sum() + stats.loss).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_it_says_what_it_took_once(caplog):
    auto._announce.cache_clear()
    layer = make()
    with caplog.at_level(logging.INFO, logger="swinmoe"):
        for _ in range(3):
            layer(torch.randn(5, 4))
    assert [r.getMessage() for r in caplog.records] == [
        "moe.dispatcher=auto takes ragged: " + choose("cpu", torch.float32, "dropless")[1]
    ]
    assert "dispatcher='auto' -> 'ragged' (on a CPU" in repr(layer)
    assert layer.dispatcher_taken() == choose("cpu", torch.float32, "dropless")
    assert "dispatcher='auto' -> 'padded' (with fixed capacity" in repr(make("fixed", device="meta"))


def test_without_tutel_one_clear_error_and_auto_goes_on(no_tutel):
    assert choose("cuda", torch.float32, "fixed")[0] == "padded"
    with pytest.raises(BackendUnavailableError) as caught:
        MoEMlp(MoEConfig(num_experts=4, dispatcher="tutel"), dim=4, hidden_dim=6)
    message = str(caught.value)
    for part in ("not installed", "'Tutel Installation' in the README of github.com/microsoft/Tutel", "ragged needs"):
        assert part in message


def test_a_tutel_that_does_not_load_says_so(monkeypatch, tmp_path):
    (tmp_path / "tutel").mkdir()
    (tmp_path / "tutel" / "__init__.py").write_text("")
    (tmp_path / "tutel" / "moe.py").write_text("from tutel import a_kernel_that_was_built_for_another_torch")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tutel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match=r"installed but does not load.*another_torch.*build it again"):
        MoEMlp(MoEConfig(num_experts=4, dispatcher="tutel"), dim=4, hidden_dim=6)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tutel"]:
        del sys.modules[name]  # the broken one; monkeypatch puts back what was there before
