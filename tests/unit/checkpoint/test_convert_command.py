"""`swinmoe convert` from end to end, what it refuses, and the list of published files."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from swinmoe.checkpoint.export import export_ranks, export_state, write_export
from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.reader import model_config, read_model
from swinmoe.checkpoint.released import released
from swinmoe.checkpoint.unpickle import read_pickle
from swinmoe.cli import app
from swinmoe.commands import convert
from swinmoe.config import ExpertConfig, ModelConfig, MoEConfig
from swinmoe.config.io import parse_overrides
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.build import preset_config
from swinmoe.moe import MoEMlp

DATA = Path(__file__).parents[2] / "data"
SPARSE = "swin_moe_micro"
SPARSE_OVER = {"embed_dim": 8, "moe": {"num_experts": 4}}


def dense(seed: int = 0, **over) -> SwinTransformer:
    size = {"img_size": (32, 32), "window_size": (4, 4), "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
    return filled(build_model(ModelConfig(**{**size, "num_classes": 5, **over}), seed=seed))


def sparse(seed: int = 0, **moe) -> SwinTransformer:
    over = {**SPARSE_OVER, "moe": {**SPARSE_OVER["moe"], **moe}}
    return filled(build_model(preset_config(SPARSE, **over), seed=seed))


@torch.no_grad()
def filled(model: SwinTransformer) -> SwinTransformer:
    """Biases too, so that losing one shows."""
    rng = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("style", ["v1", "v2"])
@pytest.mark.parametrize("to", ["microsoft", "timm", "torchvision", "huggingface"])
def test_there_and_back(style: str, to: str, tmp_path: Path) -> None:
    model = dense(style=style)
    write_export(model, tmp_path / "theirs", to)
    settings = ["img_size=32", "window_size=4", "drop_path_rate=0.1"]
    settings += ["pad_keys=mask", "small_map=shrink", "mask_value=null"]
    convert.run([str(tmp_path / "theirs"), str(tmp_path / "ours"), *settings])
    assert model_config(tmp_path / "ours") == model.config
    again = build_model(model_config(tmp_path / "ours"), seed=9)
    load_pretrained(again, tmp_path / "ours")
    assert equal(again.state_dict(), model.state_dict())
    convert.run([str(tmp_path / "ours"), str(tmp_path / "again")], to=to)
    for file in (tmp_path / "theirs").iterdir():
        other = tmp_path / "again" / file.name
        if file.suffix == ".safetensors":
            assert equal(dict(read_model(file)), dict(read_model(other)))
        elif file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads(other.read_text())
        else:
            assert equal(read_pickle(file, "a"), read_pickle(other, "b"))


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_tutel_there_and_back(ranks: int, master: bool, tmp_path: Path) -> None:
    model = sparse(experts={"fc2_bias": "frozen-zero"} if master else {"fc2_bias": "learned"})
    to = "tutel-master" if master else "tutel"
    write_export(model, tmp_path / "theirs", to, num_ranks=ranks)
    over = ["embed_dim=8", "moe.num_experts=4", f"moe.experts.fc2_bias={'frozen-zero' if master else 'learned'}"]
    convert.run([str(tmp_path / "theirs" / "model.pth"), str(tmp_path / "ours"), *over], preset=SPARSE)
    again = sparse(seed=7, experts={"fc2_bias": "frozen-zero"} if master else {"fc2_bias": "learned"})
    load_pretrained(again, tmp_path / "ours")
    assert equal(again.state_dict(), model.state_dict())
    convert.run([str(tmp_path / "ours"), str(tmp_path / "again")], to=to, ranks=ranks)
    for file in (tmp_path / "theirs").iterdir():
        assert equal(read_pickle(file, "a"), read_pickle(tmp_path / "again" / file.name, "b"))


def test_hugging_faces_config_tells_the_window(tmp_path: Path) -> None:
    """Its V2 files hold no tables; without the config beside them the window is not known."""
    model = dense(style="v2", img_size=(64, 64), window_size=(8, 8), pretrained_window_sizes=(4, 4))
    write_export(model, tmp_path / "theirs", "huggingface")
    convert.run([str(tmp_path / "theirs"), str(tmp_path / "ours")])
    config = model_config(tmp_path / "ours")
    assert (config.img_size, config.window_size, config.pretrained_window_sizes) == ((64, 64), (8, 8), (4, 4))
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="does not tell its window"):
        convert.run([str(tmp_path / "theirs"), str(tmp_path / "again")])


def test_the_dense_baseline_as_published(tmp_path: Path) -> None:
    """A zip of one file whose name ends in .global; unpacked, by the folder or by the name before that."""
    model = dense(style="swin_moe", mlp_fc2_bias=False)
    (tmp_path / "files").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "files" / "x.pth.global")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "files" / "x.pth.global", "x/x.pth.global")
    for number, source in enumerate((tmp_path / "x.zip", tmp_path / "files", tmp_path / "files" / "x.pth")):
        words = [str(source), str(tmp_path / str(number)), "img_size=32", "window_size=4"]
        convert.run(words)
        config = model_config(tmp_path / str(number))
        assert config.style == "swin_moe" and not config.mlp_fc2_bias
        again = build_model(config, seed=4)
        load_pretrained(again, tmp_path / str(number))
        assert equal(again.state_dict(), model.state_dict())
    (tmp_path / "x.zip").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="damaged, or no zip"):
        convert.run([str(tmp_path / "x.zip"), str(tmp_path / "new")])


def test_uneven_ranks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="4 experts, which 3 ranks cannot share"):
        export_ranks(sparse(), 3)


def tutel_layer(experts: int, dim: int, hidden: int) -> dict[str, Tensor]:
    """A layer's state as Tutel names and shapes it."""
    rng = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    return {
        "_num_global_experts": torch.tensor(experts),
        "gates.0.wg.weight": draw(experts, dim),
        "experts.batched_fc1_w": draw(experts, hidden, dim),
        "experts.batched_fc2_w": draw(experts, hidden, dim),
        "experts.batched_fc1_bias": draw(experts, hidden),
        "experts.batched_fc2_bias": draw(experts, dim),
    }


@pytest.mark.parametrize("hidden", [6, 10])
def test_a_bare_tutel_layer_by_function(hidden: int, tmp_path: Path) -> None:
    """fc2 is applied from the right there: y = h W. With as many hidden units as channels no shape would tell."""
    state = tutel_layer(3, 6, hidden)
    torch.save(state, tmp_path / "layer.pt")
    convert.run([str(tmp_path / "layer.pt"), str(tmp_path / "layer")])
    layer = MoEMlp(MoEConfig(num_experts=3, experts=ExpertConfig(fc2_bias="learned")), dim=6, hidden_dim=hidden).eval()
    report = load_pretrained(layer, tmp_path / "layer" / "model.safetensors")
    assert len(report.loaded) == 1 + 3 * 4
    x = torch.randn(20, 6)
    gates = (x @ state["gates.0.wg.weight"].T).softmax(-1)
    gate, chosen = gates.max(-1)
    expected = torch.zeros_like(x)
    for e in range(3):
        w1, w2, b1, b2 = (state[f"experts.batched_{part}"][e] for part in ("fc1_w", "fc2_w", "fc1_bias", "fc2_bias"))
        rows = chosen == e
        expected[rows] = gate[rows, None] * (F.gelu(x[rows] @ w1.T + b1) @ w2 + b2)
    with torch.no_grad():
        assert torch.allclose(layer(x)[0], expected, atol=1e-5)
        layer.experts.fc2_weight.copy_(layer.experts.fc2_weight.transpose(1, 2).reshape(3, 6, hidden).clone())
        assert not torch.allclose(layer(x)[0], expected, atol=1e-1)


@torch.no_grad()
def test_experts_and_dense_mlps_agree_by_function() -> None:
    """An expert's weights put in a dense MLP compute what the expert does, and what its exported form does."""
    model = sparse()
    files, _ = export_ranks(model, 1)
    prefix = "layers.1.blocks.1.mlp._moe_layer.experts.batched_"
    w1, w2, b1, b2 = (files[0][prefix + part][2] for part in ("fc1_w", "fc2_w", "fc1_bias", "fc2_bias"))
    x = torch.randn(9, 16)
    theirs = F.gelu(x @ w1.T + b1) @ w2 + b2
    block = dense(embed_dim=8).layers[1].blocks[1].mlp
    experts = model.layers[1].blocks[1].mlp.experts
    block.fc1.weight.copy_(experts.fc1_weight[2]), block.fc1.bias.copy_(experts.fc1_bias[2])
    block.fc2.weight.copy_(experts.fc2_weight[2]), block.fc2.bias.copy_(experts.fc2_bias[2])
    assert torch.allclose(block(x), theirs, atol=1e-6)


def test_several_gates_are_not_dropped() -> None:
    state = {**tutel_layer(3, 6, 8), "gates.1.wg.weight": torch.zeros(3, 6)}
    layer = MoEMlp(MoEConfig(num_experts=3), dim=6, hidden_dim=8)
    with pytest.raises(CheckpointError, match=r"gates\.1\.wg\.weight"):
        load_pretrained(layer, state)


class Malice:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('ran')",)


def test_pickles_that_ask_for_more_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"norm.weight": torch.zeros(2)}, "args": Malice()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth.*exec'.*strip it"):
        convert.run([str(tmp_path / "bad.pth"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cut\.pth.*is damaged, or no file of weights"):
        convert.run([str(tmp_path / "cut.pth"), str(tmp_path / "out")])


def test_a_yacs_node_is_read_as_a_dict_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one (yacs_node.pth, written by Microsoft's code), and one whose class would act if it were made."""
    assert "yacs" not in sys.modules
    assert set(read_pickle(DATA / "yacs_node.pth", "the file")) == {"norm.weight"}
    assert "yacs" not in sys.modules

    class CfgNode(dict):
        def __init__(self, *args: object) -> None:
            raise AssertionError("made")

        __setstate__ = __init__

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        context.setitem(sys.modules, "yacs.config", module)
        node = CfgNode.__new__(CfgNode)
        node["A"] = 1
        node.__dict__["__immutable__"] = True
        torch.save({"model": {"norm.weight": torch.zeros(2)}, "config": node}, tmp_path / "node.pth")
        assert set(read_pickle(tmp_path / "node.pth", "the file")) == {"norm.weight"}
    with pytest.raises(pickle.UnpicklingError):  # the permission ended with the reading
        torch.load(tmp_path / "node.pth")


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    for tree, message in (
        ([torch.zeros(2)], "holds no tensors by name"),
        ({"model": {"a.weight": torch.zeros(2), "lr": 0.1}}, r"what is none: \['lr'\]"),
    ):
        torch.save(tree, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=message):
            read_pickle(tmp_path / "x.pth", "x.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert.run([str(tmp_path / "none.pth"), str(tmp_path / "out")])


def test_words_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a source and a new folder"):
        convert.run([str(tmp_path)])
    with pytest.raises(ConfigError, match="did you mean 'timm'"):
        convert.run(["a", "b"], to="tim")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        convert.run(["a", str(tmp_path / "out")])


def test_sparse_files_need_to_be_told_what_weights_do_not_say(tmp_path: Path) -> None:
    write_export(sparse(), tmp_path / "theirs", "tutel", num_ranks=2)
    with pytest.raises(CheckpointError, match=r"how many a token visits.*--preset"):
        convert.run([str(tmp_path / "theirs"), str(tmp_path / "ours")])


def test_models_that_others_do_not_build_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"timm builds no such model: it has experts \(use tutel\)"):
        export_state(sparse(), "timm")
    with pytest.raises(CheckpointError, match="its style is neither v1 nor v2"):
        export_state(dense(style="swin_moe"), "huggingface")
    with pytest.raises(CheckpointError, match="no second bias"):
        export_state(dense(mlp_fc2_bias=False), "timm")
    with pytest.raises(CheckpointError, match="a stage's window is smaller"):
        export_state(dense(window_size=(8, 8)), "torchvision")
    with pytest.raises(CheckpointError, match="it has no experts"):
        export_ranks(dense(style="swin_moe"), 1)


def test_published_files_name_presets_that_exist_and_settings_that_fit() -> None:
    found = released()
    assert len({item.name for item in found}) == len(found) == 167
    assert {item.family for item in found} == {"swin-v1", "swin-v2", "swin-moe", "simmim-v1", "simmim-v2"}
    for item in found:
        assert item.size is None and item.sha256 is None  # no list states them; put them in when one does
        if item.preset is not None:
            config = preset_config(item.preset, **parse_overrides(item.overrides))
            if item.name.endswith("_22k"):
                assert config.num_classes == 21841
            if "patch4_window" in item.name and "to" not in item.name.split("patch4_")[1]:
                assert f"_window{config.window_size[0]}_{config.img_size[0]}" in item.name


def test_the_command_line(tmp_path: Path) -> None:
    torch.save({"model": dense().state_dict()}, tmp_path / "x.pth")
    run = CliRunner()
    words = ["convert", str(tmp_path / "x.pth"), str(tmp_path / "timm"), "num_classes=3", "--to", "timm"]
    refused = run.invoke(app, words)
    assert isinstance(refused.exception, CheckpointError) and "head.weight" in str(refused.exception)
    done = run.invoke(app, [*words, "--allow", "head.*"])
    assert done.exit_code == 0
    assert "layout microsoft -> timm" in done.output and "2 initialised anew: head.weight" in done.output
    assert read_model(tmp_path / "timm" / "model.safetensors")["head.fc.weight"].shape == (3, 16)
    assert "swin_moe_s_192_w12_e32_cosine" in run.invoke(app, ["convert", "--list", "cosine"]).output


def test_list_prints_a_command_for_each(capsys: pytest.CaptureFixture) -> None:
    convert.list_released("swin_moe_small_patch4_window12_192_8expert")
    assert "--preset swin_moe_s_192_w12_e8" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="families: simmim-v1"):
        convert.list_released("nonsense")
