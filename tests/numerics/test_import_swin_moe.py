"""Files of Microsoft's Swin-MoE, in all their layouts, give the logits that Microsoft's code gave with Tutel.

`tests/data/record_swin_moe.py` ran that code on four processes, saved with its own functions, and recorded logits and
hashes of files. Here the same weights are cut into the same files, byte for byte (the hashes), converted and run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from import_weights import DERIVED, draw, fingerprint, images, recorded
from torch import Tensor

from swinmoe.checkpoint.load import load_pretrained
from swinmoe.config import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer, build_model

VECTORS, FACTS = recorded("swin_moe.safetensors")
SHAPE, CASES = FACTS["shape"], FACTS["cases"]
FILES = [(case, layout) for case, facts in CASES.items() for layout in facts["hashes"]]


@cache
def weights(case: str) -> dict[str, Tensor]:
    """All parameters in Microsoft's names, experts whole."""
    facts = CASES[case]
    return {name: draw(name, tuple(shape), facts["seed"]) for name, shape in facts["shapes"].items()}


def files(case: str, layout: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """The files of a job's ranks, and the shared one."""
    facts, (kind, width) = CASES[case], layout.split("_")
    ranks, experts = int(width), facts["experts"]
    states: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in weights(case).items():
        for rank, state in enumerate(states):
            if ".experts." not in name:
                state[name] = tensor
            elif experts >= ranks:
                held = experts // ranks
                state[name] = tensor[rank * held : (rank + 1) * held]
            else:
                slices = ranks // experts
                size = -(-tensor.shape[1] // slices)
                start = rank % slices * size
                state[name] = tensor[rank // slices : rank // slices + 1, start : start + size]
    for state in states:
        for name, tensor in VECTORS.items():
            if name.startswith("e8/") and name.endswith(DERIVED):
                short = name.removeprefix("e8/")
                state[short] = torch.tensor(experts) if short.endswith("_num_global_experts") else tensor
    if kind == "periodic":
        return states, None
    learned = [name for name in weights(case) if ".experts." in name and name not in facts["frozen"]]
    master = {name: tensor for name, tensor in states[0].items() if name not in learned}
    states = [{name: state[name] for name in learned} for state in states]
    if kind == "released":
        return [old(state) for state in states], old(master)
    return states, master


def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Tutel had it in 2022: biases with one axis more, and no count of experts."""
    return {
        name: tensor[:, None] if "batched" in name and name.endswith("_bias") else tensor
        for name, tensor in state.items()
        if not name.endswith("_num_global_experts")
    }


def save(folder: Path, case: str, layout: str) -> Path:
    ranks, master = files(case, layout)
    for rank, state in enumerate(ranks):
        torch.save({"model": {n: t.clone() for n, t in state.items()}}, folder / f"moe.pth.rank{rank}")
    if master is not None:
        torch.save({"model": {n: t.clone() for n, t in master.items()}}, folder / "moe.pth.master")
    return folder / "moe.pth"


def model(case: str, seed: int = 0) -> SwinTransformer:
    facts = CASES[case]
    policy = CapacityPolicy(kind="fixed", factor=1.25)
    config = ModelConfig(
        style="swin_moe",
        img_size=(SHAPE["img_size"],) * 2,
        window_size=(SHAPE["window_size"],) * 2,
        embed_dim=SHAPE["embed_dim"],
        depths=tuple(SHAPE["depths"]),
        num_heads=tuple(SHAPE["num_heads"]),
        num_classes=SHAPE["num_classes"],
        mlp_fc2_bias=False,
        mask_value=-100.0,
        moe_blocks=((1,), (1,)),
        moe=MoEConfig(
            num_experts=facts["experts"],
            top_k=facts.get("top_value", 1),
            router=RouterConfig(
                type="cosine" if facts.get("cosine_router") else "linear",
                noise=1.0,
                batch_prioritized=True,
                proj_dim=8,
            ),
            capacity=CapacityConfig(train=policy, eval=policy),
            losses=BalanceLossConfig(importance_load_tutel=0.01),
            experts=ExpertConfig(fc2_bias="frozen-zero"),
        ),
    )
    return build_model(config, seed=seed).eval()


@torch.no_grad()
def assert_logits(ours: SwinTransformer, case: str) -> None:
    """Each rank's images are routed among themselves, as they were on that rank."""
    expected = VECTORS[f"{case}/logits"]
    dropped = 0
    for rank, logits in enumerate(expected):
        out = ours(images(2, SHAPE["img_size"], 1000 + rank))
        assert float((out.logits - logits).abs().max()) <= 1e-4
        dropped += sum(int((stats.routed - stats.kept).sum()) for stats in out.routing.values())
    assert dropped > 0  # the capacity bites, so that the order of tokens is tested too


@pytest.mark.parametrize(("case", "layout"), FILES)
def test_logits_equal_microsofts(case: str, layout: str, tmp_path: Path) -> None:
    ranks, master = files(case, layout)
    states = ranks if master is None else [*ranks, master]
    assert [fingerprint(state) for state in states] == CASES[case]["hashes"][layout]
    ours = model(case)
    report = load_pretrained(ours, save(tmp_path, case, layout))
    assert not report.missing and not report.reinitialised
    assert all(name.endswith(DERIVED) for name in report.unused)
    partial = (
        master is not None and next(t for n, t in master.items() if "fc2_bias" in n).numel() < ours.config.embed_dim
    )
    widened = {name for name, how in report.resized.items() if "frozen at zero" in how}
    assert all(".fc2.bias" in name for name in widened)
    assert bool(widened) or not partial
    assert_logits(ours, case)


def test_a_swapped_pair_of_experts_would_show(tmp_path: Path) -> None:
    """The comparison notices what it should: here, ranks 1 and 2 in each other's place."""
    path = save(tmp_path, "e16", "periodic_4")
    one, two = tmp_path / "moe.pth.rank1", tmp_path / "moe.pth.rank2"
    aside = tmp_path / "aside"
    one.rename(aside), two.rename(one), aside.rename(two)
    ours = model("e16")
    load_pretrained(ours, path)
    with pytest.raises(AssertionError):
        assert_logits(ours, "e16")


def test_every_way_to_name_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, "e8", "released_4")
    everything = sorted(tmp_path.iterdir())
    for source in (path, tmp_path, tmp_path / "moe.pth.rank2", everything):
        ours = model("e8", seed=1)
        load_pretrained(ours, source)
        assert_logits(ours, "e8")


def test_the_zip_as_published(tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "files").mkdir()
    save(tmp_path / "files", "e8", "released_32")
    with zipfile.ZipFile(tmp_path / "moe.zip", "w") as archive:
        for path in (tmp_path / "files").iterdir():
            archive.write(path, f"moe/{path.name}")
    ours = model("e8")
    load_pretrained(ours, tmp_path / "moe.zip")
    assert_logits(ours, "e8")


def test_incomplete_sets_are_refused(tmp_path: Path) -> None:
    ours = model("e8")
    path = save(tmp_path, "e8", "released_32")
    (tmp_path / "moe.pth.rank5").rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=r"lacks the files of ranks \[5\]"):
        load_pretrained(ours, path)
    (tmp_path / "aside").rename(tmp_path / "moe.pth.rank5")
    (tmp_path / "moe.pth.rank31").unlink()
    with pytest.raises(CheckpointError, match="31 expert parts for 8 experts; give the files of all ranks"):
        load_pretrained(ours, path)
    for rank in range(16, 31):  # half of them look like a job of 16 ranks, but for the slices of the second bias
        (tmp_path / f"moe.pth.rank{rank}").unlink()
    with pytest.raises(CheckpointError, match=r"2 slice\(s\) of each expert.*tells of 4"):
        load_pretrained(ours, path)
    (tmp_path / "moe.pth.master").unlink()
    with pytest.raises(CheckpointError, match=r"ends in \.master"):
        load_pretrained(ours, path)


def test_ranks_that_drifted_apart_must_be_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, "e8", "periodic_4")
    third = torch.load(tmp_path / "moe.pth.rank2")
    third["model"]["norm.weight"] = third["model"]["norm.weight"] + 1e-3
    torch.save(third, tmp_path / "moe.pth.rank2")
    ours = model("e8")
    with pytest.raises(
        CheckpointError, match=r"'norm.weight' should be the same on all ranks and differs by up to 1.0e-03"
    ):
        load_pretrained(ours, path)
    with pytest.raises(CheckpointError, match="should be the same"):
        load_pretrained(ours, path, allow=["*"])  # which may be meant for something else
    report = load_pretrained(ours, path, allow=["ranks:norm.*"])
    assert "rank 0's taken" in report.resized["norm.weight"]
    assert_logits(ours, "e8")


def test_a_second_bias_that_was_not_frozen_is_not_made_up(tmp_path: Path) -> None:
    path = save(tmp_path, "e16", "final_4")
    shared = torch.load(tmp_path / "moe.pth.master")
    name = next(name for name in shared["model"] if name.endswith("fc2_bias"))
    shared["model"][name] += 1
    torch.save(shared, tmp_path / "moe.pth.master")
    with pytest.raises(CheckpointError, match="the rest of it was never saved"):
        load_pretrained(model("e16"), path)
