"""What each memory tactic saves and costs: a measurement to run by hand on an idle machine, not a test.

    OMP_NUM_THREADS=2 python tests/distributed/measure_memory.py step [--image 192] [--window 12] [--rounds 11]
    python tests/distributed/measure_memory.py ranks [--processes 2] [--rounds 11]

`step`: forward and backward pass of one model on one process, tactics in turn within each round. Peak: bytes that
tensors hold at the worst moment, weights and gradients included, counted exactly; of offloading what would be left on a
GPU, were the host another place. Gradients are held against those without any tactic, in float32.

`ranks`: a training step of an arm spread over gloo processes, one thread each. Bytes between steps are this rank's own,
counted exactly (the largest of all ranks); the peak is the growth of the resident set of processes that do nothing
else, from before the model is built, so it has what allocators and the backend keep too. Gradients are proven by
`swinmoe verify parallel`, which `tests/distributed/test_memory_spread.py` runs for each of these.

Prints Markdown.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pool import Pool
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.data import Batch
from swinmoe.models import SwinTransformer, build_model
from swinmoe.parallel import is_expert_parameter, local_part, make_mesh, saved_on_host
from swinmoe.profiling.clock import Timing, take_turns
from swinmoe.profiling.memory import peak_memory
from swinmoe.runtime import make_accelerator
from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.schedule import Length

MIB = 2**20


def run_of(args: argparse.Namespace, parallel: dict[str, Any] | None = None) -> RunConfig:
    """The acceptance model of whole steps: experts in the odd blocks of stage 3 and the last of stage 4."""
    capacity = {"kind": "fixed", "factor": 1.25}
    tree = {
        "model": {
            "style": "v2",
            "img_size": [args.image, args.image],
            "window_size": [args.window, args.window],
            "embed_dim": args.dim,
            "depths": [2, 2, 6, 2],
            "num_heads": [max(1, args.dim // 32 * 2**stage) for stage in range(4)],
            "num_classes": 1000,
            "drop_path_rate": 0.0,
            "moe": {"num_experts": 8, "losses": {"gshard": 0.01}, "capacity": {"train": capacity, "eval": capacity}},
            "moe_blocks": [[], [], [1, 3, 5], [1]],
        },
        "data": {"name": "synthetic", "image_size": [args.image, args.image]},
        "train": {"steps": 10**6, "epochs": None, "batch_size": args.batch},
        "log": {"peak_flops": 1e11},
    }
    return build(RunConfig, merge(tree, {"parallel": parallel or {}}))


def batch_of(run: RunConfig, images: int, rank: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(rank)
    pictures = torch.randn(images, 3, *run.model.img_size, generator=draw)
    return Batch(pictures, torch.randint(1000, (images,), generator=draw), None, torch.arange(images))


# ----------------------------------------------------------------------------------------------------- on one process

TACTICS: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpointing, stages 1 and 2": {"recompute": [0, 1]},
    "checkpointing, all stages": {"recompute": True},
    "attention in 8 chunks, stages 1 and 2": {"chunks": [8, 8, 1, 1]},
    "attention in 8 chunks, all stages": {"chunks": 8},
    "attention in 8 chunks and checkpointing": {"chunks": 8, "recompute": True},
    "offloading": {"offload": True},
    "offloading and checkpointing": {"offload": True, "recompute": True},
}


def as_if_elsewhere() -> AbstractContextManager[object]:
    """Offloading whose host copies are not counted, and come back as new tensors, as from a host to a GPU."""
    saved: Any = saved_on_host(torch.device("cpu"))
    pack, unpack = saved.pack_hook, saved.unpack_hook

    def pack_unseen(tensor: Tensor) -> Any:
        with _disable_current_modes():
            return pack(tensor if isinstance(tensor, nn.Parameter) else tensor.clone())

    def unpack_copy(packed: Any) -> Tensor:
        found: Tensor = unpack(packed)
        return found if isinstance(packed, Tensor) else found.clone()

    saved.pack_hook, saved.unpack_hook = pack_unseen, unpack_copy
    return saved  # type: ignore[no-any-return]


def step_of(model: SwinTransformer, images: Tensor, tactic: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        model.set_grad_checkpointing(tactic.get("recompute", False))
        model.set_attention_chunks(tactic.get("chunks", 1))
        model.zero_grad(set_to_none=False)
        with as_if_elsewhere() if tactic.get("offload") else nullcontext():
            output = model(images)
            loss = output.logits.square().mean() + output.aux_loss
        del output  # what follows needs the graph alone
        loss.backward()

    return step


def gradients(model: SwinTransformer, step: Callable[[], None]) -> list[Tensor]:
    step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def measure_step(args: argparse.Namespace) -> None:
    run = run_of(args)
    model = build_model(run.model).train()
    model.set_attention_impl(args.attention)
    images = batch_of(run, args.batch).images
    steps = {name: step_of(model, images, tactic) for name, tactic in TACTICS.items()}
    expected = gradients(model, steps["none"])
    largest = max(float(g.abs().max()) for g in expected)
    own = sum(2 * p.nbytes for p in model.parameters())
    lines = {}
    for name, step in steps.items():
        found = gradients(model, step)
        off = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest
        lines[name] = (peak_memory(step, model, inputs=[images])["peak"], off)
    times = take_turns(steps, args.rounds)
    print(
        f"{args.image} px, window {args.window}, C {args.dim}, batch {args.batch}, attention `{args.attention}`, "
        f"{torch.get_num_threads()} threads; weights and gradients {own / MIB:.0f} MiB\n"
    )
    print("| tactic | peak MiB | of it above weights and gradients | ms | time | gradients differ by |")
    print("|---|---|---|---|---|---|")
    base, base_ms = lines["none"][0] - own, times["none"].median
    for name, (peak, off) in lines.items():
        above = peak - own
        print(
            f"| {name} | {peak / MIB:.0f} | {above / MIB:.0f} ({above / base:.2f}) | {shown(times[name])} | "
            f"{times[name].median / base_ms:.2f} | {off:.0e} |"
        )


def shown(timing: Timing) -> str:
    return f"{timing.median:.0f} ({timing.low:.0f}-{timing.high:.0f})"


# ------------------------------------------------------------------------------------------------- on several processes

SPREADS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO": {"zero": True},
    "FSDP2": {"shard_dense": True},
    "DDP, experts spread": {"ep_size": 2},
    "ZeRO, experts spread": {"ep_size": 2, "zero": True},
    "FSDP2, experts spread": {"ep_size": 2, "shard_dense": True},
    "FSDP2 and ZeRO, experts spread": {"ep_size": 2, "shard_dense": True, "zero": True},
}


def arm_of(args: argparse.Namespace, name: str) -> tuple[Arm, Callable[[], None]]:
    run = run_of(args, SPREADS[name])
    mesh = make_mesh(run.parallel, 8)
    arm = make_arm(name, run, mesh, make_accelerator("fp32", cpu=True), Length(steps=10**6), 100)
    batch = batch_of(run, args.batch // mesh.world, mesh.rank)
    return arm, lambda: arm.train_step([batch])


def bytes_between_steps(args: argparse.Namespace, name: str) -> dict[str, int]:
    """This rank's, after two steps in a process of its own; and how much its resident set has grown at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arm, step = arm_of(args, name)
    step()
    step()
    found = dict.fromkeys(("dense", "experts", "gradients", "moments"), 0)
    for parameter in arm.raw.parameters():
        found["experts" if is_expert_parameter(parameter) else "dense"] += local_part(parameter).nbytes
        found["gradients"] += 0 if parameter.grad is None else local_part(parameter.grad).nbytes
        moments = arm.optimizer.state[parameter].values()
        found["moments"] += sum(local_part(value).nbytes for value in moments if not value.is_meta)
    found["peak growth"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found


def times_of(args: argparse.Namespace, names: list[str]) -> dict[str, Timing]:
    arms = {name: arm_of(args, name) for name in names}
    group = make_mesh(run_of(args).parallel).world_group
    return take_turns({name: step for name, (_, step) in arms.items()}, args.rounds, group=group)


def measure_ranks(args: argparse.Namespace) -> None:
    names = [name for name, keys in SPREADS.items() if args.processes % keys.get("ep_size", 1) == 0]
    held: dict[str, dict[str, int]] = {}
    for name in names:
        held[name] = on_new_processes(args, bytes_between_steps, name)
    times: dict[str, Timing] = on_new_processes(args, times_of, names)
    print(
        f"{args.processes} processes, {args.image} px, window {args.window}, C {args.dim}, batch {args.batch} over "
        "all; MiB of the rank that holds most\n"
    )
    columns = list(held[names[0]])
    print(f"| spread | {' | '.join(columns)} | ms | time |\n{'|---' * (len(columns) + 3)}|")
    for name in names:
        sizes = " | ".join(f"{held[name][column] / MIB:.0f}" for column in columns)
        print(f"| {name} | {sizes} | {shown(times[name])} | {times[name].median / times['DDP'].median:.2f} |")


def on_new_processes(args: argparse.Namespace, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` answers: the first rank's, or of numbers each one's largest over ranks."""
    pool = Pool(args.processes)
    try:
        answers = pool.run(function, args, *arguments, timeout=3600.0)
    finally:
        pool.close()
    if not all(isinstance(value, int) for value in answers[0].values()):
        return answers[0]
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("step", "ranks"))
    parser.add_argument("--image", type=int, default=192)
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--attention", choices=("auto", "native", "explicit", "sdpa"), default="auto")
    args = parser.parse_args(words)
    measure_step(args) if args.what == "step" else measure_ranks(args)


if __name__ == "__main__":
    main()
