"""Training steps of one process beside peers': a measurement to run by hand on an idle machine, not a test.

    python tests/distributed/measure_speed.py layer [--rounds 31] [--primed]         # four shapes, some 5 minutes
    python tests/distributed/measure_speed.py model [--rounds 15] [--swin-repo DIR]  # sparse over dense, some 5
    python tests/distributed/measure_speed.py dense [--rounds 15]                    # timm and torchvision, some 4
    python tests/distributed/measure_speed.py compiled [--rounds 15] [--timm]        # torch.compile, cold and warm
    python tests/distributed/measure_speed.py attention [--rounds 15]                # its ways by shape, some 5
    python tests/distributed/measure_speed.py memory                                 # peaks of a layer's step
    ... --allocator default                                                          # any of them, see below

Arms take turns in rounds; medians with 95 % intervals. A step is forward and backward with the layers' balance losses
and without the optimiser; gradients stay from step to step and are set to zero in it, except in the arms that say
`given back`, which let them go as `optimizer.zero_grad()` does: PyTorch's modules then get fresh memory, our experts
the same as before. `kernels`: with our kernels in C++ (`use_native_kernels`), which compiled models take by themselves;
experts take theirs in all arms.
What is freed stays with the process in all arms, as in swinmoe's own commands; with `--allocator default` it is as in a
process that knows nothing of them, and freshly mapped memory takes its time. An arm finds caches as the arm before left
them, which next to a library that works through much memory is not as its own steps leave them: `--primed` takes that
out. Tutel and FairScale take part where they are installed, Microsoft's model where a checkout of its repository is
named. Other load on the machine spoils ratios too: many small products wait for each other more often than few large
ones. Prints JSON, one line a table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swinmoe
from swinmoe.config import ModelConfig, MoEConfig
from swinmoe.config.io import build
from swinmoe.models import SwinTransformer, build_model, compile_blocks, use_native_kernels
from swinmoe.moe import MoEMlp
from swinmoe.profiling import take_turns
from swinmoe.runtime import keep_freed_memory

Step = Callable[[], Any]
SHAPES = ((4608, 384, 1536, 8, 1), (4608, 384, 1536, 32, 1), (4608, 384, 1536, 8, 2), (1152, 768, 3072, 8, 1))
"""Tokens, width, hidden width, experts, choices."""
SWIN = {"img_size": 192, "window_size": 12, "num_classes": 1000}
TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
BATCH = 4
CONDITIONS: dict[str, Any] = {}
"""Of the process, told with every table."""


# ---------------------------------------------------------------------------------------------------------- one layer


def dense_mlp(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def layer_step(module: nn.Module, x: Tensor, slope: Tensor, *, give_back: bool = False) -> Step:
    """The output is pulled by `slope`; balance losses as they come with it."""

    def step() -> None:
        module.zero_grad(set_to_none=give_back)
        y = module(x)
        y, stats = y if isinstance(y, tuple) else (y, None)
        loss = stats.loss if stats is not None else getattr(y, "l_aux", None)
        if loss is None or not loss.requires_grad:
            y.backward(slope)
        else:
            torch.autograd.backward([y, loss], [slope, None])

    return step


class OnGroups(nn.Module):
    """FairScale's layer on (groups, tokens, width), as it wants them."""

    def __init__(self, layer: nn.Module, groups: int) -> None:
        super().__init__()
        self.layer, self.groups = layer, groups

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(self.groups, -1, x.shape[1])).view(x.shape)


def peers(dim: int, hidden: int, experts: int, top_k: int) -> dict[str, nn.Module]:
    """Layers of others, as Swin-MoE sets Tutel's up and with the capacity that needs no drops."""
    found: dict[str, nn.Module] = {}
    if importlib.util.find_spec("tutel"):
        from tutel import moe as tutel_moe

        for name, factor, priority in (("tutel, 1.25", 1.25, True), ("tutel, no drops", 0, False)):
            found[name] = tutel_moe.moe_layer(
                gate_type={"type": "top", "k": top_k, "capacity_factor": factor, "fp32_gate": True, "gate_noise": 1.0},
                model_dim=dim,
                experts={
                    "num_experts_per_device": experts,
                    "type": "ffn",
                    "hidden_size_per_expert": hidden,
                    "activation_fn": F.gelu,
                },
                batch_prioritized_routing=priority,
                is_gshard_loss=False,
                normalize_gate=False,
            )
    if top_k == 2 and importlib.util.find_spec("fairscale"):
        from fairscale.nn.moe import MOELayer, Top2Gate

        layer = MOELayer(Top2Gate(dim, experts), nn.ModuleList(dense_mlp(dim, hidden) for _ in range(experts)))
        found["fairscale"] = OnGroups(layer, 8)
    return found


def ours(dim: int, hidden: int, experts: int, top_k: int) -> nn.Module:
    return MoEMlp(MoEConfig(num_experts=experts, top_k=top_k), dim=dim, hidden_dim=hidden)


def layers(args: argparse.Namespace) -> None:
    for tokens, *shape in SHAPES:
        dim, hidden, experts, top_k = shape
        x, slope = torch.randn(tokens, dim, requires_grad=True), torch.randn(tokens, dim)
        modules = {"dense": dense_mlp(dim, hidden), "swinmoe": ours(*shape), **peers(*shape)}
        steps = {name: layer_step(module, x, slope) for name, module in modules.items()}
        steps |= {f"{n}, given back": layer_step(modules[n], x, slope, give_back=True) for n in ("dense", "swinmoe")}
        told = {"tokens": tokens, "dim": dim, "hidden": hidden, "experts": experts, "top_k": top_k}
        told["primed"] = args.primed
        tell("layer", told, steps, args.rounds, baseline="dense", times=top_k, primed=args.primed)


# -------------------------------------------------------------------------------------------------------- whole models


def model_step(model: nn.Module, images: Tensor, *, give_back: bool = False) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=give_back)
        out = model(images)
        if isinstance(out, tuple) and not hasattr(out, "logits"):  # Microsoft's: logits and balance loss
            loss = out[0].square().mean() + (out[1] if torch.is_tensor(out[1]) else 0)
        else:
            loss = getattr(out, "logits", out).square().mean() + getattr(out, "aux_loss", 0)
        loss.backward()

    return step


def microsoft(repository: Path) -> dict[str, nn.Module]:
    """Its Swin-MoE and the dense form of it, from a checkout."""
    sys.path.insert(0, str(repository))
    spec = importlib.util.spec_from_file_location("theirs", repository / "models" / "swin_transformer_moe.py")
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    shape = {**SWIN, **TINY, "mlp_fc2_bias": False, "init_std": 0.005, "num_local_experts": 8, "top_value": 1}
    shape |= {"capacity_factor": 1.25, "is_gshard_loss": False, "moe_drop": 0.1, "aux_loss_weight": 0.01}
    shape |= {"pretrained_window_sizes": [0] * 4}
    return {
        "microsoft dense": theirs.SwinTransformerMoE(moe_blocks=[[-1]] * 4, **shape),
        "microsoft sparse": theirs.SwinTransformerMoE(moe_blocks=[[-1], [-1], [1, 3, 5], [1]], **shape),
    }


def models(args: argparse.Namespace) -> None:
    shape = {"depths": (2, 2, 6, 2), "num_classes": 1000, "drop_path_rate": 0.1}
    sparse = swinmoe.create_model("swin_moe_s_192_w12_e8", **shape, moe_blocks=((), (), (1, 3, 5), (1,)))
    dense = swinmoe.create_model("swin_moe_s_192_w12_e8", **shape, moe=None, moe_blocks=())
    found = {"dense": dense, "sparse": sparse}
    if args.swin_repo is not None:
        found |= microsoft(args.swin_repo)
    for name in ("dense", "sparse"):
        found[f"{name}, kernels"] = with_kernels(found[name])
    images = torch.randn(BATCH, 3, 192, 192)
    steps = {name: model_step(model.train(), images) for name, model in found.items()}
    for name in ("dense", "sparse", "dense, kernels", "sparse, kernels"):
        steps[f"{name}, given back"] = model_step(found[name], images, give_back=True)
    tell("model", {"batch": BATCH, "experts": 8, **SWIN}, steps, args.rounds, baseline="dense")


def with_kernels(model: nn.Module) -> nn.Module:
    """A copy that takes our kernels in C++."""
    copied = copy.deepcopy(model)
    use_native_kernels(copied)
    return copied


def theirs_and_ours() -> dict[str, nn.Module]:
    import timm
    from torchvision.models import swin_transformer as tv

    shared = {"patch_size": [4, 4], **TINY, "window_size": [12, 12], "stochastic_depth_prob": 0.2}
    return {
        "timm v1": timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.2, **SWIN),
        "v1": swinmoe.create_model("swin_v1_t_224_w7", **SWIN),
        "torchvision v1": tv.SwinTransformer(**shared),
        "timm v2": timm.create_model("swinv2_tiny_window8_256", drop_path_rate=0.2, **SWIN),
        "v2": swinmoe.create_model("swin_v2_t_256_w8", **SWIN),
        "torchvision v2": tv.SwinTransformer(
            **shared, block=tv.SwinTransformerBlockV2, downsample_layer=tv.PatchMergingV2
        ),
    }


def dense_models(args: argparse.Namespace) -> None:
    images = torch.randn(BATCH, 3, 192, 192)
    found = theirs_and_ours()
    for version in ("v1", "v2"):
        steps = {name: model_step(m.train(), images) for name, m in found.items() if name.endswith(version)}
        steps[f"{version}, kernels"] = model_step(with_kernels(found[version]).train(), images)
        tell("dense", {"batch": BATCH, "version": version, **SWIN}, steps, args.rounds, baseline=f"timm {version}")


def compiled(args: argparse.Namespace) -> None:
    """In processes of their own: with an empty cache, and again with what the first left there."""
    if args.child is not None:
        one_compiled(args.child, args.rounds, args.timm)
        return
    for version in ("v1", "v2"):
        with tempfile.TemporaryDirectory() as cache:
            for temperature in ("cold", "warm"):
                words = [sys.executable, __file__, "compiled", "--child", f"{version},{temperature}"]
                words += ["--rounds", str(args.rounds), "--threads", str(args.threads)] + ["--timm"] * args.timm
                words += ["--allocator", args.allocator]
                subprocess.run(words, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})


def one_compiled(what: str, rounds: int, with_timm: bool) -> None:
    version, temperature = what.split(",")
    images = torch.randn(BATCH, 3, 192, 192)
    found = {name: m.train() for name, m in theirs_and_ours().items() if name in (version, f"timm {version}")}
    mine = theirs_and_ours()[version].train()
    assert isinstance(mine, SwinTransformer)
    compile_blocks(mine)
    steps = {name: model_step(m, images) for name, m in found.items()}
    steps[f"{version}, compiled"] = model_step(mine, images)
    steps[f"{version}, compiled, given back"] = model_step(mine, images, give_back=True)
    begun = time.perf_counter()
    steps[f"{version}, compiled"]()
    seconds = {f"{version}, first step": time.perf_counter() - begun}
    if with_timm:
        other = torch.compile(theirs_and_ours()[f"timm {version}"].train())
        steps[f"timm {version}, compiled"] = model_step(other, images)
        begun = time.perf_counter()
        steps[f"timm {version}, compiled"]()
        seconds[f"timm {version}, first step"] = time.perf_counter() - begun
    told = {"batch": BATCH, "version": version, "cache": temperature, **SWIN, "first_step_seconds": seconds}
    tell("compiled", told, steps, rounds if temperature == "warm" else 1, baseline=f"timm {version}")


# ----------------------------------------------------------------------------------------------------------- attention

WINDOWS = (
    (4, 8, 96, 16), (4, 32, 96, 8), (7, 7, 768, 8), (7, 14, 384, 8), (7, 56, 96, 2), (8, 32, 192, 2),
    (12, 12, 768, 4), (12, 48, 96, 1), (16, 16, 384, 4), (16, 64, 96, 1), (24, 24, 384, 1), (24, 48, 192, 1),
)  # fmt: skip
"""Side of a window and of the map, width, images; heads are 32 wide."""


def attention_step(attention: nn.Module, way: str, tables: Any, x: Tensor, slope: Tensor | None, half: bool) -> Step:
    """`slope` None: a forward pass without gradients. `half`: under bfloat16 autocast."""

    def step() -> None:
        attention.attention_impl = way
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(slope is not None):
            y = attention(x, tables)
        if slope is not None:
            attention.zero_grad(set_to_none=True)
            x.grad = None
            y.backward(slope)

    return step


def attentions(args: argparse.Namespace) -> None:
    """What `auto` takes beside our kernel, written out and fused, of shifted windows where there are any."""
    for style, (window, side, dim, images) in itertools.product(("v1", "v2"), WINDOWS):
        tree = {"style": style, "embed_dim": dim, "depths": [2], "num_heads": [dim // 32], "patch_size": 1}
        config = build(ModelConfig, tree | {"window_size": window, "img_size": side, "num_classes": 1})
        (stage,) = build_model(config).layers
        shifted = int(side > window)
        attention, tables = stage.blocks[shifted].attn, stage._tables((side, side))[shifted]
        for training, half in itertools.product((True, False), (False, True)):
            x = torch.randn(images, side, side, dim, dtype=torch.bfloat16 if half else None, requires_grad=training)
            slope = torch.randn_like(x) if training else None
            ways = ("auto", "native", "explicit", "sdpa")
            steps = {way: attention_step(attention, way, tables, x, slope, half) for way in ways}
            shape = {"style": style, "window": window, "map": side, "dim": dim, "images": images}
            tell("attention", shape | {"training": training, "bf16": half}, steps, args.rounds, baseline="auto")


# -------------------------------------------------------------------------------------------------------------- memory


def memory(args: argparse.Namespace) -> None:
    """Peak of the process above what it held before its first step, after three; each arm in a fresh process."""
    if args.child is not None:
        one_peak(args.child)
        return
    same = ["--threads", str(args.threads), "--allocator", args.allocator]
    names = ["dense", "swinmoe", *peers(8, 8, 8, 2)]
    table = {
        name: {
            tokens: json.loads(
                subprocess.run(
                    [sys.executable, __file__, "memory", "--child", f"{tokens},{name}", *same],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for tokens in (4096, 8192, 16384)
        }
        for name in names
    }
    dim, hidden, experts, top_k = SHAPES[2][1:]
    print(
        json.dumps(
            {
                "table": "memory",
                "dim": dim,
                "hidden": hidden,
                "experts": experts,
                "top_k": top_k,
                **CONDITIONS,
                "mib": table,
            }
        )
    )


def one_peak(what: str) -> None:
    tokens, _, name = what.partition(",")
    shape = SHAPES[2][1:]
    module = {"dense": lambda: dense_mlp(*shape[:2]), "swinmoe": lambda: ours(*shape)}.get(name)
    layer = module() if module is not None else peers(*shape)[name]
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)  # touched
    x = torch.randn(int(tokens), shape[0], requires_grad=True)
    slope = torch.randn_like(x)
    x.grad = torch.ones_like(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = layer_step(layer, x, slope)
    for _ in range(3):
        step()
    print(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1))


# ---------------------------------------------------------------------------------------------------------------------


def tell(
    table: str,
    shape: Mapping[str, Any],
    steps: Mapping[str, Step],
    rounds: int,
    *,
    baseline: str,
    times: int = 1,
    primed: bool = False,
) -> None:
    """Time the steps and print a line: medians with intervals, and medians over `times` baselines."""
    timings = take_turns(steps, rounds, primed=primed)
    base = timings[baseline].median * times
    line = {
        "table": table,
        **shape,
        **CONDITIONS,
        "ms": {name: [round(v, 2) for v in (t.median, t.low, t.high)] for name, t in timings.items()},
        f"over {times if times > 1 else ''} {baseline}".replace("  ", " "): {
            name: round(timing.median / base, 3) for name, timing in timings.items()
        },
    }
    if "microsoft sparse" in timings:
        line["over microsoft sparse"] = round(timings["sparse"].median / timings["microsoft sparse"].median, 3)
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "layer": layers,
        "model": models,
        "dense": dense_models,
        "compiled": compiled,
        "attention": attentions,
        "memory": memory,
    }
    parser.add_argument("table", choices=tables)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--primed", action="store_true", help="layer: each step goes once uncounted before it is timed")
    parser.add_argument("--swin-repo", type=Path, help="a checkout of Microsoft's Swin-Transformer")
    parser.add_argument("--timm", action="store_true", help="compile timm's models too, whole: many minutes")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept", help="what becomes of freed memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    CONDITIONS.update(threads=args.threads, allocator=args.allocator)
    if args.allocator == "kept":
        keep_freed_memory()
    # Tutel and FairScale want a job, if only of one process.
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        tables[args.table](args)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
