"""Carried moments follow the gradients that experts really have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.checkpoint.upcycle_moments import load_moments, upcycle_moments
from swinmoe.commands.saving import moments_in_files
from swinmoe.config import BalanceLossConfig, ExpertConfig, MoEConfig, OptimConfig, RouterConfig
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.build import preset_config
from swinmoe.train.optim import make_optimizer


def dense_model() -> SwinTransformer:
    cfg = preset_config("swin_v1_mini_16_p2_w4", depths=(1, 2), moe=None, moe_blocks=((), (0, 1)), drop_path_rate=0.0)
    return build_model(cfg, seed=3, dtype=torch.float64)


def sparse_model(dense: SwinTransformer, moe: MoEConfig) -> SwinTransformer:
    return build_model(replace(dense.config, moe=moe), seed=8, dtype=torch.float64)


def loss_of(model: SwinTransformer, seed: int = 0) -> Tensor:
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
    return model(x).logits.square().sum()


def gradients(model: SwinTransformer) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    MoEConfig(num_experts=4, top_k=1),
    MoEConfig(num_experts=4, top_k=2, router=RouterConfig(normalize_gates=True)),
    MoEConfig(num_experts=4, top_k=2, router=RouterConfig(score="sigmoid")),
    MoEConfig(
        num_experts=8, top_k=4, experts=ExpertConfig(hidden_ratio=0.5), router=RouterConfig(normalize_gates=True)
    ),
    MoEConfig(num_experts=4, top_k=1, shared_expert_ratio=1.0),
    MoEConfig(num_experts=6, top_k=3, experts=ExpertConfig(hidden_ratio=0.25), shared_expert_ratio=0.25),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_first_moments_add_up_as_the_gradients_do(case):
    """Where moments are one gradient, those of a part's experts add up to those experts' gradients, for every unit."""
    dense = dense_model()
    sparse = sparse_model(dense, replace(CASES[case], losses=BalanceLossConfig()))
    upcycle(dense, sparse)
    moments = {f"{name}#exp_avg": grad for name, grad in gradients(dense).items()}
    moments |= {f"{name}#exp_avg_sq": grad.square() for name, grad in gradients(dense).items()}
    moments |= {f"{name}#step": torch.tensor(7.0) for name, _ in dense.named_parameters()}
    carried, actual = upcycle_moments(moments, sparse), gradients(sparse)
    for name, grad in actual.items():
        moment = carried[f"{name}#exp_avg"]
        if ".router." in name:
            assert not moment.any() and float(carried[f"{name}#step"]) == 0
            continue
        assert float(carried[f"{name}#step"]) == 7
        if name.endswith("fc2_bias"):
            moment, grad = moment.sum(0), grad.sum(0)
        elif ".experts." in name:
            parts = round(1 / (CASES[case].experts.hidden_ratio or 1) * (0.75 if case == 5 else 1))
            moment, grad = (x.unflatten(0, (-1, parts)).sum(0) for x in (moment, grad))
        torch.testing.assert_close(moment, grad, rtol=1e-9, atol=1e-12, msg=name)
        # second moments are squares of the first ones, if the parent's were
        torch.testing.assert_close(carried[f"{name}#exp_avg_sq"], carried[f"{name}#exp_avg"].square())


def test_units_drawn_anew_have_no_first_moment():
    dense, how = dense_model(), Upcycling(drop=0.5, seed=4)
    sparse = sparse_model(dense, MoEConfig(num_experts=4, top_k=1))
    upcycle(dense, sparse, how)
    moments = {
        f"{name}#{key}": torch.ones_like(p) for name, p in dense.named_parameters() for key in ("exp_avg", "exp_avg_sq")
    } | {f"{name}#step": torch.tensor(1.0) for name, _ in dense.named_parameters()}
    carried = upcycle_moments(moments, sparse, how)
    for name, layer in sparse.moe_layers().items():
        parent = dense.get_submodule(name).fc1.weight
        kept = (layer.experts.fc1_weight == parent).all(-1)  # (E, F)
        assert kept.sum().item() == kept.numel() // 2
        assert torch.equal(carried[f"{name}.experts.fc1_weight#exp_avg"].any(-1), kept)
        assert torch.equal(carried[f"{name}.experts.fc1_bias#exp_avg"] != 0, kept)
        assert torch.equal(carried[f"{name}.experts.fc2_weight#exp_avg"].any(1), kept)
        assert carried[f"{name}.experts.fc2_weight#exp_avg_sq"].all()


def test_an_optimiser_goes_on_from_carried_moments():
    dense = dense_model()
    optim = OptimConfig(base_lr=1e-3)
    adam = make_optimizer(dense, optim)
    for seed in range(3):
        adam.zero_grad()
        loss_of(dense, seed).backward()
        adam.step()
    moments = {f"{name}#{key}": value for name, p in dense.named_parameters() for key, value in adam.state[p].items()}
    equal = RouterConfig(score="sigmoid")  # undecided: every gate is 1/2
    sparse = sparse_model(dense, MoEConfig(num_experts=4, top_k=4, router=equal, losses=BalanceLossConfig()))
    upcycle(dense, sparse)
    carried = upcycle_moments(moments, sparse)
    new = make_optimizer(sparse, optim)
    load_moments(new, sparse, moments_in_files(carried))
    for parameter, state in new.state.items():
        name = next(n for n, p in sparse.named_parameters() if p is parameter)
        assert all(torch.equal(value.double(), carried[f"{name}#{key}"].double()) for key, value in state.items())
    for model, optimizer in ((dense, adam), (sparse, new)):
        optimizer.zero_grad()
        loss_of(model, 5).backward()
        optimizer.step()
    # All experts are visited with equal gates: Adam, which does not mind the gradient's size, steps as it would have.
    for name, layer in sparse.moe_layers().items():
        mlp = dense.get_submodule(name)
        torch.testing.assert_close(layer.experts.fc1_weight, mlp.fc1.weight.expand(4, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(sparse.head.weight, dense.head.weight, rtol=0, atol=1e-9)
    with pytest.raises(CheckpointError, match=r"no 'head\.bias#exp_avg'"):
        upcycle_moments({k: v for k, v in moments.items() if k != "head.bias#exp_avg"}, sparse)
    with pytest.raises(CheckpointError, match=r"moments of 'head\.bias'"):
        upcycle_moments(moments | {"head.bias#exp_avg": torch.zeros(3)}, sparse)
