"""Converting a Tutel layer: what is carried over, what is refused by name. Outputs are compared in tests/numerics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinmoe import from_tutel
from swinmoe.config import BalanceLossConfig, CapacityPolicy, ExpertConfig, RouterConfig
from swinmoe.errors import CheckpointError, ConfigError
from tests.numerics.tutel_cases import DIM, HIDDEN, NUM_EXPERTS, Case, shared_tensors, stand_in

SHARED = shared_tensors()
PLAIN = Case("linear", 2, 1.25, bpr=True, normalize=False, gshard=True, noise=1.0)


def layer_of(case: Case = PLAIN, **changes):
    layer = stand_in(case, SHARED)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def test_every_setting_is_carried_over():
    cfg = from_tutel(layer_of(), loss_weight=0.01).cfg
    policy = CapacityPolicy(kind="fixed", factor=1.25)
    assert (cfg.num_experts, cfg.top_k, cfg.dispatcher, cfg.shared_expert_ratio) == (NUM_EXPERTS, 2, "ragged", 0.0)
    assert cfg.router == RouterConfig(type="linear", noise=1.0, batch_prioritized=True)
    assert (cfg.capacity.train, cfg.capacity.eval) == (policy, policy)
    assert cfg.losses == BalanceLossConfig(gshard=0.01, batch="local")
    assert cfg.experts == ExpertConfig(type="gelu")
    cosine = from_tutel(
        layer_of(replace(PLAIN, gate="cosine", normalize=True, bpr=False, gshard=False, factor=-2.0))
    ).cfg
    assert cosine.router == RouterConfig(type="cosine", normalize_gates=True, noise=1.0, proj_dim=4)
    assert cosine.capacity.train == CapacityPolicy(kind="bounded", factor=2.0)
    assert cosine.losses == BalanceLossConfig(importance_load_tutel=1.0, batch="local")
    assert from_tutel(layer_of(replace(PLAIN, factor=0.0))).cfg.capacity.train.kind == "dropless"


def test_the_source_stays_as_it_is():
    layer = layer_of()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    new = from_tutel(layer)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_mode_dtype_and_frozen_parameters():
    layer = layer_of().eval()
    layer.experts.batched_fc2_w.requires_grad_(False)
    new = from_tutel(layer)
    assert not new.training
    assert {n for n, p in new.named_parameters() if not p.requires_grad} == {"experts.fc2_weight"}
    narrow = layer_of()
    narrow.experts.bfloat16()
    new = from_tutel(narrow)
    assert new.experts.fc1_weight.dtype == torch.bfloat16
    assert new.router.weight.dtype == torch.float32
    assert new.cfg.router.fp32
    narrow.gates.bfloat16()
    narrow.gates[0].fp32_gate = False
    assert not from_tutel(narrow).cfg.router.fp32


def with_two_gates(layer):
    layer.gates.append(layer_of().gates[0])


def with_a_gate_of_its_own(layer):
    layer.gates[0].__class__ = type("Mine", (nn.Module,), {"__module__": "my.gates"})


def with_experts_of_its_own(layer):
    layer.experts.__class__ = type("Mine", (nn.Module,), {"__module__": "my.experts"})


def with_wide_output(layer):
    layer.experts.batched_fc2_w = nn.Parameter(torch.zeros(NUM_EXPERTS, HIDDEN, DIM + 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 1}, r"holds 1 of 5 experts.*tutel\.checkpoint\.gather.*num_experts_per_device=5"),
        ({"sharded_count": 2, "num_local_experts": 1}, r"holds 1/2 of one of 5 experts.*tutel\.checkpoint\.gather"),
        ({"is_postscore": False}, r"is_postscore=False weights the inputs"),
        ({"result_func": len}, r"result_func is code of yours"),
        ({"skip_moe": True}, r"SKIP_MOE=1"),
        ({"a2a_ffn_overlap_degree": 2}, r"a2a_ffn_overlap_degree=2 makes Tutel round"),
        (with_two_gates, r"gate_type is a list of 2 gates"),
        (with_a_gate_of_its_own, r"custom gate my\.gates\.Mine.*register_router"),
        (with_experts_of_its_own, r"custom experts my\.experts\.Mine.*register_expert"),
        (with_wide_output, r"output_dim=8 differs from model_dim=6"),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_what_we_lack_is_refused_by_name(change, message):
    layer = layer_of()
    if callable(change):
        change(layer)
    else:
        for name, value in change.items():
            setattr(layer, name, value)
    with pytest.raises(CheckpointError, match=message):
        from_tutel(layer)


def test_rounding_to_the_overlap_does_not_matter_where_nothing_is_dropped():
    assert (
        from_tutel(layer_of(replace(PLAIN, factor=0.0), a2a_ffn_overlap_degree=2)).cfg.capacity.train.kind == "dropless"
    )


def test_what_is_no_tutel_layer_is_refused():
    with pytest.raises(CheckpointError, match=r"a Linear without.*_moe_layer"):
        from_tutel(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"a SimpleNamespace without \['experts'"):
        from_tutel(SimpleNamespace(gates=[]))


def test_the_load_loss_without_noise_is_refused():
    with pytest.raises(ConfigError, match=r"moe\.router\.noise=0"):
        from_tutel(layer_of(replace(PLAIN, gshard=False, noise=0.0)))


@pytest.mark.parametrize(
    ("function", "name"),
    [(F.gelu, "gelu"), (F.relu, "relu"), (nn.GELU(), "gelu"), (lambda x: x.clamp(min=0), "relu")],
)
def test_activations_are_known_by_their_values(function, name):
    layer = layer_of()
    layer.experts.activation_fn = function
    assert from_tutel(layer).cfg.experts.type == name


def test_unknown_activations_ask_for_their_name():
    layer = layer_of()
    for function in (torch.tanh, lambda x: F.gelu(x, approximate="tanh"), lambda x: x.chunk(2, -1)[0]):
        layer.experts.activation_fn = function
        with pytest.raises(CheckpointError, match=r"none of \['gelu', 'relu'\].*register experts"):
            from_tutel(layer)
    layer.experts.activation_fn = lambda x: F.dropout(F.gelu(x), 0.1)
    state = torch.random.get_rng_state()
    with pytest.raises(CheckpointError, match=r"random.*dropout="):
        from_tutel(layer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert from_tutel(layer, activation="gelu", dropout=0.1).cfg.experts == ExpertConfig(type="gelu", dropout=0.1)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(F.gelu(x))

    def by_hand(self, x):
        return F.dropout(F.gelu(x), 0.1, self.training)


DROP = nn.Dropout(0.1).eval()


def _dropping(how: str):
    module = Dropping().eval()

    def named(x):
        return module.by_hand(x)

    return module, {
        "a module": module,
        "a method": module.by_hand,
        "a closure": lambda x: module.drop(F.gelu(x)),
        "a default": lambda x, drop=module.drop: drop(F.gelu(x)),
        "a global": lambda x: DROP(F.gelu(x)),
        "a function of a function": lambda x: named(x),
        "a partial": partial(lambda drop, x: drop(F.gelu(x)), module.drop),
    }[how]


@pytest.mark.parametrize(
    "how", ["a module", "a method", "a closure", "a default", "a global", "a function of a function", "a partial"]
)
def test_a_dropout_is_not_lost_because_the_layer_is_in_evaluation(how: str):
    module, function = _dropping(how)
    layer = layer_of().eval()
    layer.experts.activation_fn = function
    with pytest.raises(CheckpointError, match=r"random in training; say which it is.*dropout="):
        from_tutel(layer)
    assert not any(part.training for part in (*module.modules(), *layer.modules(), DROP)), "left as it was"
    assert from_tutel(layer, activation="gelu", dropout=0.1).cfg.experts.dropout == 0.1
    assert from_tutel(layer, activation="gelu").cfg.experts.dropout == 0.0, "as it was told"


def test_llama_experts_are_swiglu():
    layer = layer_of()
    gen = torch.Generator().manual_seed(0)
    shapes = [(NUM_EXPERTS, DIM, HIDDEN), (NUM_EXPERTS, DIM, HIDDEN), (NUM_EXPERTS, HIDDEN, DIM)]
    stacks = [torch.randn(shape, generator=gen) for shape in shapes]
    experts = type("LlamaFFNNetwork", (nn.Module,), {"__module__": "tutel.experts.llama_ffn"})()
    for number, (stack, shape) in enumerate(zip(stacks, shapes, strict=True), 1):
        setattr(experts, f"W_fc{number}", nn.Parameter(stack.flatten()))
        setattr(experts, f"W_fc{number}_full_shape", shape)
    experts.activation_fn = F.silu
    layer.experts = experts
    new = from_tutel(layer)
    rows = torch.randn(NUM_EXPERTS, 3, DIM, generator=gen)
    want = (F.silu(rows @ stacks[0]) * (rows @ stacks[1])) @ stacks[2]
    torch.testing.assert_close(new.experts.function(False)(rows, None, new.experts.weights()), want)
    experts.W_fc1.requires_grad_(False)
    with pytest.raises(CheckpointError, match="one of W_fc1 and W_fc2 is frozen"):
        from_tutel(layer)
    experts.activation_fn = F.relu
    with pytest.raises(CheckpointError, match="not SiLU"):
        from_tutel(layer)
