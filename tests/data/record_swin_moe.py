"""Record what Microsoft's Swin-MoE computes, on four gloo processes with Tutel, and what its files hold.

Run by hand where both are installed; neither is part of this project, whose tests read the recording only:

    python -m torch.distributed.run --nproc-per-node 4 tests/data/record_swin_moe.py CHECKOUT SCRATCH

CHECKOUT is a copy of github.com/microsoft/Swin-Transformer; files are written to SCRATCH, and what is recorded of them
is names, shapes and hashes. Weights and images are drawn by tests/numerics/import_weights.py.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "numerics"))

from import_weights import DERIVED, draw, fingerprint, images  # noqa: E402

SHAPE = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 7}
CASES = {  # experts; as in the published configurations, but for k = 2, which is in the paper
    "e8": {"experts": 8},
    "e16": {"experts": 16},
    "e32": {"experts": 32},
    "e32_cosine": {"experts": 32, "cosine_router": True},
    "e8_k2": {"experts": 8, "top_value": 2},
    "e2_sliced": {"experts": 2},
}
WIDE = {"e8": 32, "e16": 32, "e32": 32, "e32_cosine": 32}  # published on 32 ranks


def part(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Rank's part of an expert tensor, as Tutel spreads it: experts in a row, or hidden units of one in a row."""
    experts = whole.shape[0]
    if experts >= ranks:
        return whole.chunk(ranks)[rank]
    slices = ranks // experts
    if name.endswith("fc2_bias"):
        width = -(-whole.shape[1] // slices)
        return whole.new_zeros(1, width)
    return whole[rank // slices].chunk(slices)[rank % slices][None]


def global_shape(name: str, shape: tuple[int, ...], experts: int, dim: int) -> tuple[int, ...]:
    if ".experts." not in name:
        return shape
    hidden = 4 * dim
    return {
        "batched_fc1_w": (experts, hidden, dim),
        "batched_fc2_w": (experts, hidden, dim),
        "batched_fc1_bias": (experts, hidden),
        "batched_fc2_bias": (experts, dim),
    }[name.rsplit(".", 1)[-1]]


def released(ranks: list[dict], master: dict) -> tuple[list[dict], dict]:
    """The final form in the shapes that Tutel had when the published files were written (2022)."""

    def old(state: dict) -> dict:
        return {
            name: tensor[:, None] if "batched" in name and name.endswith("_bias") else tensor
            for name, tensor in state.items()
            if not name.endswith("_num_global_experts")
        }

    return [old(rank) for rank in ranks], old(master)


def check_gather(folder: Path, ranks: list[dict], whole: dict) -> None:
    """Tutel's own tool joins these files to the same experts."""
    for rank, state in enumerate(ranks):
        torch.save({"model": state}, folder / f"gather.{rank}.pth")
    out = folder / "gathered.pth"
    arguments = ["--input_size", str(len(ranks)), "--inputs", str(folder / "gather.{rank}.pth"), "--output", str(out)]
    subprocess.run(
        [sys.executable, "-m", "tutel.checkpoint.gather", *arguments, "--namespace", "model"], check=True, stdout=-3
    )
    joined = torch.load(out)["model"]
    for name, tensor in whole.items():
        found = joined[name]
        if ".experts." in name and tensor.numel() != found.numel():
            assert name.endswith("fc2_bias"), name  # rounded up
            continue
        assert torch.equal(found.reshape(tensor.shape), tensor), name


def main() -> None:
    checkout, scratch = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, checkout)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    from models.swin_transformer_moe import SwinTransformerMoE
    from utils_moe import save_checkpoint
    from yacs.config import CfgNode

    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, dict] = {}
    for case, choice in CASES.items():
        experts = choice["experts"]
        model = SwinTransformerMoE(
            **SHAPE,
            moe_blocks=[[1], [1]],
            num_local_experts=experts // ranks if experts >= ranks else -(ranks // experts),
            mlp_fc2_bias=False,
            init_std=0.005,
            is_gshard_loss=False,
            moe_drop=0.1,
            cosine_router_dim=8,
            **{key: value for key, value in choice.items() if key != "experts"},
        ).eval()
        whole = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                dim = SHAPE["embed_dim"] * 2 ** (int(name.split(".")[1]) if name.startswith("layers.") else 0)
                full = draw(name, global_shape(name, tuple(parameter.shape), experts, dim), len(case))
                whole[name] = full
                parameter.copy_(part(name, full, rank, ranks) if ".experts." in name else full)
                if parameter.requires_grad and getattr(parameter, "skip_allreduce", False):
                    model.add_param_to_skip_allreduce(name)
            logits, _ = model(images(2, SHAPE["img_size"], 1000 + rank))
        gathered = [torch.empty_like(logits) for _ in range(ranks)]
        dist.all_gather(gathered, logits)

        folder = scratch / case
        folder.mkdir(parents=True, exist_ok=True)
        config = CfgNode(
            {"OUTPUT": str(folder), "TRAIN": {"MOE": {"SAVE_MASTER": False}}, "MODEL": {"TYPE": "swin_moe"}}
        )
        config.freeze()
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        scaler = torch.amp.GradScaler("cpu")
        log = logging.getLogger("record")
        save_checkpoint(config, 0, model, 0.5, optimizer, schedule, scaler, log)
        save_checkpoint(config, "final", model, 0.5, optimizer, schedule, scaler, log, zero_redundancy=True)
        dist.barrier()
        if rank == 0:
            periodic = [
                torch.load(folder / f"ckpt_epoch_0.pth.rank{r}", weights_only=False)["model"] for r in range(ranks)
            ]
            final = [torch.load(folder / f"ckpt_epoch_final.pth.rank{r}")["model"] for r in range(ranks)]
            master = torch.load(folder / "ckpt_epoch_final.pth.master")["model"]
            hashes = {"periodic_4": periodic, "final_4": [*final, master]}
            check_gather(folder, periodic, whole)
            old, old_master = released(final, master)
            hashes["released_4"] = [*old, old_master]
            for wide in [WIDE[case]] if case in WIDE else []:
                files = []
                for r in range(wide):
                    files.append(
                        {n: part(n, whole[n], r, wide) if ".experts." in n else t for n, t in periodic[0].items()}
                    )
                check_gather(folder, files, whole)
                learned = list(final[0])
                last = [{n: file[n] for n in learned} for file in files]
                shared = {n: t for n, t in files[0].items() if n not in learned}
                hashes[f"periodic_{wide}"] = files
                hashes[f"final_{wide}"] = [*last, shared]
                old, old_master = released(last, shared)
                hashes[f"released_{wide}"] = [*old, old_master]
            derived = {n: t for n, t in periodic[0].items() if n.endswith(DERIVED)}
            tensors[f"{case}/logits"] = torch.stack(gathered)
            tensors |= {f"{case}/{n}": t.clone() for n, t in derived.items() if case == "e8"}
            facts[case] = {
                **choice,
                "seed": len(case),
                "shapes": {n: list(t.shape) for n, t in whole.items()},
                "frozen": [n for n in whole if ".experts." in n and n not in final[0]],
                "hashes": {layout: [fingerprint(s) for s in states] for layout, states in hashes.items()},
            }
            print(case, float(logits.abs().max()), len(periodic[0]))
    if rank == 0:
        config = copy.deepcopy(config)
        torch.save({"model": {"norm.weight": torch.zeros(2)}, "config": config, "epoch": 3}, HERE / "yacs_node.pth")
        save_file(
            tensors, HERE / "swin_moe.safetensors", metadata={"facts": json.dumps({"shape": SHAPE, "cases": facts})}
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
