"""A trained model put to use: evaluate, fewshot, predict, look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import MICRO
from PIL import Image

from swinmoe.cli import app
from swinmoe.commands import evaluate, fewshot, look, predict
from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge, to_tree
from swinmoe.data import build_data
from swinmoe.data.pictures import find_pictures, preparation
from swinmoe.errors import ConfigError, DataError
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.evaluate_model import at_capacity, look_at
from swinmoe.train.opened import Opened, open_model

RUN: dict[str, Any] = {
    "name": "run",
    "model": {
        **MICRO,
        "img_size": 16,
        "num_classes": 10,
        "moe": {"num_experts": 4, "top_k": 2},
    },
    "data": {"name": "digits", "image_size": 16, "limit": 300},
    "optim": {"base_lr": 0.005},
    "train": {"steps": 45, "epochs": None, "batch_size": 32, "eval_batch_size": 64, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 45, "peak_flops": 1e11},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(build(RunConfig, {**RUN, "output_dir": str(tmp_path_factory.mktemp("trained"))}), show=False)[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = {"output_dir": str(tmp_path_factory.mktemp("dense")), "model": {"moe": None, "moe_blocks": []}}
    return train(build(RunConfig, merge(merge(RUN, over), {"train": {"steps": 1}})), show=False)[0]


@pytest.fixture(scope="module")
def opened(trained: Path) -> Opened:
    return open_model(trained)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve digits as files."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(load_digits().images[:12]):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{number:02}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def _text(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, out of its tables."""
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_evaluate_tells_what_training_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = (line for line in read_records(trained / "records.jsonl") if line["kind"] == "eval")
    evaluate.run(trained, [], which="auto", capacity="0.5,dropless", out=tmp_path / "out")
    assert "dropless: a prediction depends on its image alone" in _text(capsys)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["accuracy"] == told["accuracy"] and found["loss"] == pytest.approx(told["loss"], rel=1e-5)
    assert found["accuracy"] > 0.5 and found["top5"] >= found["accuracy"] and found["drop_fraction"] == 0.0
    assert found["data"] == {"name": "digits", "split": "test", "images": told["count"]}
    assert sum(score["count"] for score in found["classes"]) == told["count"]
    right = sum(score["count"] * score["accuracy"] for score in found["classes"] if score["count"])
    assert right == pytest.approx(found["accuracy"] * told["count"])
    assert sum(b["count"] for b in found["calibration"]["bins"]) == told["count"]
    assert [point["factor"] for point in found["capacity"]] == [0.5, "dropless"]
    assert found["capacity"][1]["accuracy"] == found["accuracy"] and found["capacity"][1]["dropped"] == 0
    assert found["images_per_second"] > 0
    for picture in ("reliability.png", "capacity.png"):
        assert _opened(tmp_path / "out" / picture).size[0] > 400
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| 0.5 |" in page and "## Classes" in page and "capacity.png" in page


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
def test_drops_of_a_sweep_are_those_counted_by_hand(opened: Opened, factor: float) -> None:
    """Every batch of T tokens leaves each expert C = 2·int(factor·ceil(T/4)) of the choices that routers made."""
    data = build_data(opened.run.data, seed=0).eval
    size = 64
    with at_capacity(opened.model, factor):
        found = look_at(opened, data, size)
    (layer,) = found.routing
    order = torch.randperm(len(data), generator=_generator())
    dropped = routed = 0
    for part in order.split(size):
        chosen = opened(data.batch(None, part.tolist())[0]).routing[layer].expert_ids  # dropless: the router's choices
        limit = 2 * int(factor * -(-len(chosen) // 4))
        loads = torch.bincount(chosen.flatten(), minlength=4)
        dropped += int((loads - limit).clamp(min=0).sum())
        routed += chosen.numel()
    assert (found.routed, found.dropped) == (routed, dropped) and found.drop_fraction == dropped / routed
    assert dropped > 0 or factor == 2.0
    assert opened.model.moe_layers()[layer].cfg.capacity.eval.kind == "dropless"  # as before


def _generator() -> torch.Generator:
    from swinmoe.randomness import generator

    return generator("evaluation order")


def test_dropless_does_not_depend_on_batches_and_capacity_does(
    trained: Path, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    data = build_data(opened.run.data, seed=0).eval
    images = data.batch(None, list(range(60)))[0]
    alone = torch.cat([opened(image[None]).logits for image in images])
    torch.testing.assert_close(opened(images).logits, alone, atol=1e-5, rtol=1e-5)
    with at_capacity(opened.model, 0.5):
        together = opened(images).logits
        assert not torch.allclose(together, torch.cat([opened(part).logits for part in images.split(7)]), atol=1e-3)
    tight = "model.moe.capacity.eval={kind: fixed, factor: 0.5}"
    evaluate.run(trained, [tight], which="auto", capacity=None, out=None)
    assert "a prediction depends on the images that share its batch" in _text(capsys)
    evaluate.run(trained, [tight.replace("0.5", "4")], which="auto", capacity=None, out=None)
    assert "dropped nothing here" in _text(capsys)


@pytest.mark.parametrize("factor", ["0.5", "64", None])
def test_who_uses_a_model_is_told_of_batches_too(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: str | None
) -> None:
    """By predict, fewshot and nearest neighbours: on the screen where it matters, in JSON always."""
    over = ["data.limit=60"] + ([f"model.moe.capacity.eval={{kind: fixed, factor: {factor}}}"] if factor else [])
    expected = {"0.5": "the images that share its batch", "64": "dropped nothing here", None: None}[factor]
    predict.run(trained, [pictures], over, which="auto", as_json=True)
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == 12
    assert (expected in " ".join(told.err.split())) if expected else not told.err
    common: dict[str, Any] = {"which": "auto", "draws": 1, "strength": 1.0, "shots": 1, "out": tmp_path / "out.json"}
    for neighbours in (None, 3):
        fewshot.run(trained, over, **common, neighbours=neighbours)
        batches = json.loads((tmp_path / "out.json").read_text())["batches"]
        assert batches["independent"] == (factor is None) and (expected or "dropless") in batches["said"]
        assert ((expected or "capacity") in _text(capsys)) == (expected is not None)


def test_evaluate_takes_a_config_and_overrides(trained: Path, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text("data: {name: synthetic, channels: 1, image_size: 24, synthetic_samples: 40}\n")
    found = open_model(trained, [str(config), "train.eval_batch_size=7"])
    assert found.run.data.name == "synthetic" and found.run.train.eval_batch_size == 7
    assert found.model.config.img_size == (24, 24) and found.model.config.embed_dim == 16
    assert open_model(trained, ["data.limit=5"]).run.data.limit == 5
    own = to_tree(open_model(trained).run)
    assert own["data"] == to_tree(build(RunConfig, RUN))["data"] and own["finetune"] is None


@pytest.mark.parametrize("text", ["0.5,x", "0", "-1", "1,,2", "inf", "nan"])
def test_factors_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a factor above 0 nor 'dropless'"):
        evaluate.parse_factors(text)


def test_a_dense_model_has_no_capacity(dense: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a sparse model"):
        evaluate.run(dense, [], which="auto", capacity="1", out=None)
    with pytest.raises(ConfigError, match="no experts to colour patches by"):
        look.run(dense, [pictures], [], which="auto", out=tmp_path / "x.png", dark=False)


def test_fewshot_and_neighbours(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"which": "auto", "draws": 4, "strength": None}
    fewshot.run(trained, [], **common, shots=5, neighbours=None, out=tmp_path / "five.json")
    fewshot.run(trained, [], **common, shots=1, neighbours=None, out=tmp_path / "one.json")
    fewshot.run(trained, [], **common, shots=1, neighbours=9, out=tmp_path / "near.json")
    five, one, near = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("five", "one", "near"))
    assert len(five["accuracies"]) == len(five["l2"]) == 4 and five["shots"] == 5
    assert five["accuracy"] == pytest.approx(np.mean(five["accuracies"])) and five["half_width"] > 0
    assert 0.3 < one["accuracy"] < five["accuracy"] and near["accuracy"] > 0.5 and near["of"] == 300
    assert "5 shots a class, 4 draws" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must be above 0"):
        fewshot.run(trained, [], **common, shots=0, neighbours=None, out=None)
    with pytest.raises(DataError, match="300 shots are asked for"):
        fewshot.run(trained, [], **common, shots=300, neighbours=None, out=None)


def test_predict_names_what_the_model_sees(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict.run(trained, [pictures], [], which="auto", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [Path(item["image"]).name for item in found] == [f"{n:02}.png" for n in range(12)]
    assert all(len(item["best"]) == 5 for item in found)
    assert all(item["best"][0]["probability"] >= item["best"][4]["probability"] for item in found)
    names = {item["best"][0]["name"] for item in found}
    assert names <= {str(digit) for digit in range(10)} and len(names) > 2
    predict.run(trained, [pictures / "03.png"], [], which="auto", as_json=False)
    assert f"{found[3]['best'][0]['name']} {100 * found[3]['best'][0]['probability']:.1f} %" in _text(capsys)


def test_pictures_are_prepared_as_the_data_set_is(opened: Opened, tmp_path: Path) -> None:
    data = build_data(opened.run.data, seed=0).eval
    prepare = preparation(opened.run.data)
    Image.fromarray(data.image(3)).save(tmp_path / "seen.png")
    ours = prepare.tensor([prepare.picture(tmp_path / "seen.png")])
    torch.testing.assert_close(ours[0], data.sample(None, 3)[0])
    assert prepare.name(3) == "3" and prepare.name(11) == "class 11"


def test_pictures_that_are_none_are_named(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        find_pictures([tmp_path / "empty"])
    with pytest.raises(DataError, match="does not exist"):
        find_pictures([tmp_path / "nowhere.png"])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        preparation(opened.run.data).picture(tmp_path / "text.png")


@pytest.mark.parametrize("dark", [False, True])
def test_look_draws_every_picture_and_layer(trained: Path, pictures: Path, tmp_path: Path, dark: bool) -> None:
    out = tmp_path / "sheet.png"
    look.run(trained, [pictures], [], which="auto", out=out, dark=dark)
    wide = _opened(out)
    look.run(trained, [pictures / "00.png"], [], which="auto", out=out, dark=dark)
    one = _opened(out)
    assert wide.size[0] > 12 * 168 and wide.size[1] > 2 * 168 and one.size[0] < wide.size[0]
    assert sum(wide.getpixel((2, 2))) > 600 or dark  # the page's own colour


def test_the_command_line_passes_words_on(trained: Path, pictures: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    runner = CliRunner()
    assert runner.invoke(app, ["evaluate", str(trained), "data.limit=20"]).exit_code == 0
    assert (
        runner.invoke(app, ["fewshot", str(trained), "data.limit=150", "--shots", "2", "--draws", "2"]).exit_code == 0
    )
    named = runner.invoke(app, ["predict", str(trained), str(pictures), "train.eval_batch_size=5", "--json"])
    assert named.exit_code == 0 and len(json.loads(named.stdout)) == 12
    seen = runner.invoke(app, ["look", str(trained), str(pictures), "--out", str(tmp_path / "a.png")])
    assert seen.exit_code == 0 and (tmp_path / "a.png").is_file()
    assert runner.invoke(app, ["evaluate", str(trained), "--weights", "best"]).exit_code == 2
