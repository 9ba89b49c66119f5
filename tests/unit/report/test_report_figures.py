"""What figures are drawn from: smoothing, means over seeds, shares, class information, patch pictures."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageColor
from report_records import png_text

from swinmoe.report.figures import curve_figure, mean_curve, smoothed
from swinmoe.report.interval import t_factor
from swinmoe.report.patches import CELL, expert_colours, patch_sheet, samples
from swinmoe.report.routing_figures import MAX_CLASSES, class_figure, class_tables, load_figure
from swinmoe.report.series import Curve, routing_traces, training_curves
from swinmoe.report.summarise import summary
from swinmoe.report.theme import DARK, LIGHT, styled, to_png
from swinmoe.report.wording import duration, prefix_of, ratio, scaled, signed, spread


def curve(steps: list[int], values: list[float]) -> Curve:
    step = np.asarray(steps, dtype=float)
    return Curve(step, 10 * step, 0.5 * step, np.asarray(values, dtype=float))


def routing_line(step: int, kept: list[int], arm: str = "a") -> dict:
    stats = {"routed": kept, "kept": kept, "drop_fraction": 0.0, "dead_experts": [1]}
    return {"kind": "step", "arm": arm, "seed": 0, "step": step, "loss": 1.0, "routing": {"mlp": stats}}


def test_smoothing_keeps_short_curves_and_straight_lines() -> None:
    short = np.asarray([3.0, 1.0, 2.0])
    assert smoothed(short) is short
    line = np.arange(120.0)
    np.testing.assert_allclose(smoothed(line), line, atol=1e-12)
    bumps = np.asarray([0.0, 1.0] * 60)
    assert smoothed(bumps)[50] == pytest.approx(bumps[47:54].mean())


def test_mean_curve_uses_the_steps_that_all_seeds_have() -> None:
    seeds = {0: curve([1, 2, 4], [1.0, 2.0, 4.0]), 1: curve([2, 3, 4], [4.0, 0.0, 8.0])}
    x, mean, half = mean_curve(seeds, "flops")
    assert x.tolist() == [20.0, 40.0]
    assert mean.tolist() == [3.0, 6.0]
    assert half is not None
    np.testing.assert_allclose(half, t_factor(2) * math.sqrt(2) * np.asarray([1.0, 2.0]))


def test_shares_are_of_kept_tokens() -> None:
    (trace,) = routing_traces([routing_line(20, [0, 0]), routing_line(10, [3, 1])], "a", 0)
    assert trace.step.tolist() == [10.0, 20.0]
    assert trace.share.tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert trace.dead_experts.tolist() == [1.0, 1.0]
    assert np.isnan(trace.token_entropy).all()


def test_class_information_is_one_for_perfect_and_zero_for_blind_experts() -> None:
    def table(rows: list[list[int]]) -> float:
        line = {"kind": "class_expert", "arm": "a", "seed": 0, "step": 1, "layer": "m", "table": rows}
        return class_tables([line], "a", 0)[0].information

    assert table([[5, 0], [0, 5]]) == pytest.approx(1.0)
    assert table([[2, 2], [7, 7]]) == pytest.approx(0.0)
    assert table([[0, 0], [0, 0]]) == 0.0
    # By hand: p = [[3/8, 1/8], [1/8, 3/8]] -> I = ln 2 - H(1/4)
    information = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert table([[3, 1], [1, 3]]) == pytest.approx(information / math.log(2))


def test_many_classes_show_the_most_unevenly_spread() -> None:
    rows = [[5, 5]] * 100 + [[10, 0]]
    line = {"kind": "class_expert", "arm": "a", "seed": 0, "step": 1, "layer": "m", "table": rows}
    (table,) = class_tables([line], "a", 0)
    assert len(table.rows) == MAX_CLASSES and 100 in table.rows
    with styled(DARK):
        assert len(class_figure([table], DARK).axes) == 1


def test_one_logged_point_and_one_expert_can_be_drawn() -> None:
    lines = [routing_line(7, [4])]
    with styled(LIGHT):
        assert to_png(load_figure(routing_traces(lines, "a", 0), LIGHT)).startswith(b"\x89PNG")
        figure = curve_figure(training_curves(lines, "loss"), "loss", LIGHT, summary=summary(lines))
        assert to_png(figure).startswith(b"\x89PNG")


def test_names_of_any_alphabet_and_with_dollars_can_be_drawn() -> None:
    lines = [routing_line(s, [1, 2], arm="$\\frac$ 外套 $x_1$") for s in (1, 2)]
    with styled(LIGHT):
        figure = curve_figure(training_curves(lines, "loss"), "loss", LIGHT, summary=summary(lines))
        assert to_png(figure).startswith(b"\x89PNG")


def sample_line(size: tuple[int, int], grid: list[list[int]], layer: str = "m") -> dict:
    image = {"index": 3, "label": 1, "prediction": 0, "experts": grid}
    image["png"] = png_text(np.full((size[1], size[0]), 255, dtype=np.uint8))
    owner = {"kind": "samples", "arm": "a", "seed": 0, "step": 1, "layer": layer, "class_names": ["cat", "dog"]}
    return {**owner, "images": [image]}


def pixels_of(sheet: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")).reshape(-1, 3)


def test_patches_take_their_experts_colour_by_area() -> None:
    (sample,) = samples([sample_line((16, 16), [[0, 1], [1, 1]])], "a", 0)
    assert (sample.label, sample.prediction, sample.wrong) == ("dog", "cat", True)
    pixels = pixels_of(patch_sheet([sample], 2, LIGHT))
    counts = [int((pixels == ImageColor.getrgb(c)).all(axis=1).sum()) for c in expert_colours(2)]
    quarter = CELL * CELL // 4
    legend = 31 * 31
    assert quarter <= counts[0] <= quarter + legend
    assert 3 * quarter <= counts[1] <= 3 * quarter + legend


def test_layers_of_one_image_share_a_column() -> None:
    lines = [sample_line((20, 10), [[0, 1]], "first"), sample_line((20, 10), [[-1]], "second")]
    (sample,) = samples(lines, "a", 0)
    assert list(sample.grids) == ["first", "second"]
    # More experts in the grid than declared must not fail, nor dropped patches, nor rectangular pictures.
    assert patch_sheet([sample], 1, DARK).startswith(b"\x89PNG")


def test_unreadable_pictures_are_left_out() -> None:
    line = sample_line((4, 4), [[0]])
    line["images"][0]["png"] = "not base64!"
    assert samples([line], "a", 0) == []


def test_expert_colours_stay_distinct() -> None:
    assert len(set(expert_colours(64))) == 64
    assert expert_colours(3) == expert_colours(64)[:3]


def test_wording() -> None:
    assert scaled(12_310_000, "FLOPs") == "12.3 MFLOPs"
    assert scaled(999_600) == "1.00 M" and scaled(123) == "123" and scaled(0) == "0" and scaled(None) == "–"
    assert ratio(4.1) == "4.10×" and ratio(12.34) == "12.3×"
    assert signed(-0.004, 1) == "0.0" and signed(-1.25, 1) == "−1.2" and signed(2.0, 0) == "+2"
    estimate = summary([]).arms  # no arms, no estimates
    assert estimate == () and spread(None, 1) == "–"
    assert duration(90) == "90.0 seconds" and duration(600) == "10.0 minutes" and duration(36_000) == "10.0 hours"
    assert prefix_of(5e9) == (1e9, "G") and prefix_of(0) == (1.0, "")
