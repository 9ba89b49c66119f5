"""`swinmoe upcycle` and `swinmoe experts`, called as the command line calls them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.reader import model_config
from swinmoe.checkpoint.upcycle import Upcycling
from swinmoe.cli import app
from swinmoe.commands import experts, upcycle
from swinmoe.commands.saving import moments_in_files, save_model
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.build import preset_config

MODEL = "preset: swin_v1_mini_16_p2_w4_e8, depths: [1, 1], moe_blocks: [[], [0]]"
CONFIG = f"""
name: tiny
model: {{{MODEL}, moe: {{num_experts: 4, top_k: 2, router: {{normalize_gates: true}}}}}}
data: {{name: digits, image_size: 16, limit: 64}}
train: {{epochs: 1, batch_size: 32}}
"""


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    model = build_model(preset_config("swin_v1_mini_16_p2_w4", depths=(1, 1)), seed=3)
    save_model(model, tmp_path / "dense")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "dense"


def read(folder: Path) -> SwinTransformer:
    model = build_model(model_config(folder))
    load_pretrained(model, folder)
    return model.eval()


def up(dense: Path, out: str, *overrides: str, how: Upcycling | None = None, **options) -> Path:
    folder = dense.parent / out
    given = {"which": "auto", "carry_moments": False, "allow": (), **options}
    upcycle.run(dense, dense.parent / "config.yaml", folder, list(overrides), how or Upcycling(), **given)
    return folder


def test_a_saved_model_is_upcycled_grown_pruned_and_merged_back(dense, capsys):
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = read(dense)(x).logits
    sparse = up(dense, "sparse")
    said = capsys.readouterr().out
    assert "1 initialised anew: layers.1.blocks.0.mlp.router.weight" in said
    assert "choices were dropped" not in said
    torch.testing.assert_close(read(sparse)(x).logits, before)

    def edit(source: Path, out: str, data: bool = True, **asked) -> Path:
        folder = dense.parent / out
        config = dense.parent / "config.yaml" if data else None
        experts.run(source, folder, experts.Edit(**asked), data=config, images=48, which="auto")
        return folder

    grown = edit(sparse, "grown", grow=8)
    said = capsys.readouterr().out
    assert "accuracy on 64 images (test)" in said
    assert said.count(" %") >= 2
    assert model_config(grown).moe.top_k == 4
    torch.testing.assert_close(read(grown)(x).logits, before)
    pruned = edit(grown, "pruned", prune=4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if ": kept " in line]
    layer, ids = line.split(": kept ")
    assert layer == "layers.1.blocks.0.mlp" and len(set(ids.split(", "))) == 4 and set(ids) <= set("01234567, ")
    kept = edit(pruned, "kept", data=False, keep=(3, 2, 1, 0))
    assert "before" in capsys.readouterr().out
    merged = read(edit(kept, "merged", merge="usage"))
    torch.testing.assert_close(merged(x).logits, before)
    assert merged.config.moe is None


def test_dropped_choices_are_said(dense, capsys):
    fixed = "model.moe.capacity={eval: {kind: fixed, factor: 0.5}}"
    up(dense, "sparse", fixed)
    assert "choices were dropped (moe.capacity.eval)" in capsys.readouterr().out


def test_what_cannot_be_done_is_refused_before_anything_is_written(dense):
    config = dense.parent / "config.yaml"
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        up(dense, "dense")
    with pytest.raises(ConfigError, match="describes a dense model"):
        up(dense, "out", "model.moe=null")
    with pytest.raises(CheckpointError, match="holds no optimiser"):
        up(dense, "out", carry_moments=True)
    with pytest.raises(ConfigError, match="not both multiples of 4"):
        up(dense, "out", "model.moe.experts.hidden_ratio=0.25")
    with pytest.raises(ConfigError, match=r"given: \['grow', 'prune'\]"):
        experts.Edit(grow=8, prune=2)
    with pytest.raises(ConfigError, match="given: none"):
        experts.Edit()
    with pytest.raises(ConfigError, match="use average or usage"):
        experts.Edit(merge="mean")
    with pytest.raises(ConfigError, match=r"e\.g\. 0,3,5"):
        experts.parse_ids("0-3")
    assert experts.parse_ids("2,0") == (2, 0)
    sparse = up(dense, "sparse")
    with pytest.raises(ConfigError, match="give --data CONFIG"):
        experts.run(sparse, dense.parent / "out", experts.Edit(prune=2), data=None, images=1, which="auto")
    assert not (dense.parent / "out").exists()
    assert config.exists()


def test_moments_are_named_as_checkpoints_name_them():
    named = moments_in_files(
        {"a.experts.fc1_weight#exp_avg": torch.zeros(2, 3, 4), "a.experts.fc1_weight#step": torch.tensor(3.0)}
    )
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        "a.experts.0.fc1.weight#exp_avg": (3, 4),
        "a.experts.1.fc1.weight#exp_avg": (3, 4),
        "a.experts.fc1_weight#step": (),
    }


def test_a_fine_tuned_run_is_edited_and_scored_too(dense, capsys):
    """How it was fine-tuned is in its config, and in that of --data: neither is an order to fine-tune again."""
    sparse, text = up(dense, "sparse"), f"finetune: {{freeze: moe, source: elsewhere}}\n{CONFIG}"
    (sparse / "config.yaml").write_text(text)
    (dense.parent / "tuned.yaml").write_text(text)
    for data, out in ((None, "one"), (dense.parent / "tuned.yaml", "two")):
        experts.run(sparse, dense.parent / out, experts.Edit(keep=(0, 1)), data=data, images=32, which="auto")
        assert "accuracy on 64 images (test)" in capsys.readouterr().out


def test_the_lines_of_the_page_on_experts_run(dense, tmp_path):
    """docs/howto/upcycle.md, on a model that nobody has trained since: it has no data of its own."""
    page = (Path(__file__).parents[3] / "docs" / "howto" / "upcycle.md").read_text()
    lines = re.findall(r"^swinmoe (experts runs/sparse OUT .*?)(?: *#.*)?$", page, flags=re.M)
    assert {line.split()[3] for line in lines} == {"--grow", "--prune", "--keep", "--merge"} and len(lines) == 5
    sparse = up(dense, "sparse", "model.moe.num_experts=8")
    for number, line in enumerate(lines):
        named = {
            "runs/sparse": str(sparse),
            "OUT": str(tmp_path / f"out-{number}"),
            "CONFIG": str(tmp_path / "config.yaml"),
        }
        done = CliRunner().invoke(app, [named.get(word, word) for word in line.split()])
        assert done.exit_code == 0, (line, done.output, done.exception)
        assert (tmp_path / f"out-{number}" / "config.json").is_file()
