"""The summary's numbers against values computed by hand, on records small enough to read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from swinmoe.records import read_records
from swinmoe.records.record import drop_superseded
from swinmoe.report import Estimate, estimate, summary
from swinmoe.report.headline import headline
from swinmoe.report.series import images_per_second, late_loss

Line = dict[str, Any]
T_TWO = 0.95 * math.sqrt(2 / (1 - 0.95**2))
"""Student's t quantile at 0.975 with two degrees of freedom, which has a closed form: 4.3027."""


def step_line(arm: str, seed: int, step: int, loss: float, seconds: float, images: int | None = None) -> Line:
    images = 10 * step if images is None else images
    owner = {"kind": "step", "arm": arm, "seed": seed, "step": step}
    return {**owner, "loss": loss, "images": images, "flops": 100.0 * images, "seconds": seconds, "routing": {}}


def arm_line(arm: str, seed: int, total: int, flops: float = 50.0) -> Line:
    sparse = {"moe_layers": ["a"], "num_experts": 4, "top_k": 1} if arm == "sparse" else {"moe_layers": []}
    sizes = {"params_total": total, "params_active": 100, "flops_per_image": flops, "steps": 20}
    return {"kind": "arm", "arm": arm, "seed": seed, **sizes, **sparse}


def final_line(arm: str, seed: int, loss: float, accuracy: float, step: int = 20) -> Line:
    return {
        "kind": "final",
        "arm": arm,
        "seed": seed,
        "step": step,
        "loss": loss,
        "accuracy": accuracy,
        "reason": "done",
    }


def run_line(seeds: tuple[int, ...] = (0, 1, 2), match: str = "steps", reference: str | None = None) -> Line:
    config = {"seeds": list(seeds), "match": match, "reference": reference, "arms": {"dense": {}, "sparse": {}}}
    return {"kind": "run", "command": "compare", "name": "tiny", "config": config}


DENSE = {0: (0.50, 0.80), 1: (0.60, 0.78), 2: (0.55, 0.82)}
SPARSE = {0: (0.46, 0.82), 1: (0.57, 0.79), 2: (0.50, 0.85)}


def twins(**run: Any) -> list[Line]:
    lines = [run_line(**run)]
    for arm, ends, total, pace in (("dense", DENSE, 100, 1.0), ("sparse", SPARSE, 410, 1.25)):
        for seed, (loss, accuracy) in ends.items():
            lines.append(arm_line(arm, seed, total))
            # The first interval is slow (warm-up) and must not count; the median ignores the hiccup at the end.
            times = [9.0, 9.0 + pace, 9.0 + 2 * pace, 9.0 + 3 * pace, 60.0]
            lines += [step_line(arm, seed, 4 * (i + 1), 1.0 - 0.1 * i, t) for i, t in enumerate(times)]
            lines.append(final_line(arm, seed, loss, accuracy))
    return lines


def test_estimate_is_the_textbook_t_interval() -> None:
    found = estimate([1.0, 2.0, 6.0])
    assert found is not None
    # mean 3, squared deviations 4 + 1 + 9 = 14, s = sqrt(7)
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(T_TWO * math.sqrt(7 / 3), rel=1e-12)
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert estimate([]) is None
    assert estimate([0.7]) == Estimate((0.7,), 0.7, None)


@pytest.mark.parametrize(
    ("mean", "half", "higher", "verdict"),
    [
        (0.02, 0.01, True, "better"),
        (-0.02, 0.01, True, "worse"),
        (-0.02, 0.01, False, "better"),
        (0.02, 0.01, False, "worse"),
        (0.01, 0.02, True, "noise"),
        (0.5, None, True, "single"),
    ],
)
def test_verdict(mean: float, half: float | None, higher: bool, verdict: str) -> None:
    assert Estimate((mean,), mean, half).verdict(higher_is_better=higher) == verdict


def test_arms_average_their_finals() -> None:
    dense = summary(twins()).arm("dense")
    assert dense.loss is not None and dense.accuracy is not None and dense.steps is not None
    assert dense.loss.mean == pytest.approx(0.55)
    assert dense.loss.half_width == pytest.approx(T_TWO * 0.05 / math.sqrt(3))
    assert dense.accuracy.mean == pytest.approx(0.80)
    assert dense.steps.values == (20.0, 20.0, 20.0)
    assert dense.seeds == (0, 1, 2)
    assert dense.flops is not None and dense.flops.mean == 20_000.0
    assert not dense.sparse


def test_differences_are_paired_by_seed() -> None:
    (d,) = summary(twins()).differences
    assert (d.arm, d.reference, d.seeds) == ("sparse", "dense", (0, 1, 2))
    assert d.loss is not None and d.accuracy is not None
    assert d.loss.values == pytest.approx((-0.04, -0.03, -0.05))
    # Deviations 0, 0.01, -0.01: s = 0.01. Unpaired, the spread of the seeds themselves would be five times that.
    assert d.loss.half_width == pytest.approx(T_TWO * 0.01 / math.sqrt(3))
    assert d.loss.verdict(higher_is_better=False) == "better"
    assert d.accuracy.values == pytest.approx((0.02, 0.01, 0.03))
    assert d.loss_means == pytest.approx((0.51, 0.55))
    assert d.params_total == pytest.approx(4.1)
    assert d.params_active == 1.0
    assert d.flops_per_image == 1.0


def test_speed_is_a_ratio_of_median_interval_rates() -> None:
    found = summary(twins())
    (d,) = found.differences
    rates = found.arm("dense").images_per_second
    assert rates is not None and rates.values == pytest.approx((40.0, 40.0, 40.0))  # 40 images a second
    assert d.speed is not None and d.speed.mean == pytest.approx(0.8)
    assert d.time_per_image == pytest.approx(1.25)


def test_images_per_second_of_few_lines() -> None:
    assert images_per_second([]) is None
    assert images_per_second([step_line("a", 0, 1, 1.0, 2.0, images=10)]) == 5.0
    same_moment = [step_line("a", 0, 1, 1.0, 2.0), step_line("a", 0, 2, 1.0, 2.0)]
    assert images_per_second(same_moment) is None


def test_late_loss_weighs_lines_by_their_steps() -> None:
    # Step 100: its last tenth is above 90; the line at 92 speaks for 2 steps, the one at 100 for 8.
    lines = [step_line("a", 0, s, loss, 1.0) for s, loss in ((90, 9.0), (92, 2.0), (100, 1.0))]
    assert late_loss(lines) == pytest.approx((2 * 2.0 + 8 * 1.0) / 10)
    assert late_loss([]) is None


def test_finals_missing_use_the_newest_lines() -> None:
    lines = [
        run_line(seeds=(0,)),
        arm_line("dense", 0, 100),
        arm_line("sparse", 0, 410),
        *(step_line(arm, 0, s, loss, s / 10) for arm in ("dense", "sparse") for s, loss in ((10, 1.0), (20, 0.7))),
        {"kind": "eval", "arm": "dense", "seed": 0, "step": 10, "split": "test", "weights": "model", "accuracy": 0.5},
        {"kind": "eval", "arm": "dense", "seed": 0, "step": 20, "split": "test", "weights": "model", "accuracy": 0.6},
        {"kind": "eval", "arm": "dense", "seed": 0, "step": 20, "split": "train", "weights": "model", "accuracy": 0.9},
    ]
    found = summary(lines)
    assert not found.finished
    dense = found.arm("dense")
    assert dense.loss == Estimate((0.7,), 0.7, None)
    assert dense.accuracy == Estimate((0.6,), 0.6, None)
    assert found.arm("sparse").accuracy is None
    assert found.differences[0].accuracy is None
    assert "still to go: dense seed 0 (step 20 of 20), sparse seed 0 (step 20 of 20)" in headline(found).status


def test_half_trained_seeds_do_not_join_finished_ones() -> None:
    lines = [line for line in twins() if not (line["kind"] == "final" and line["seed"] == 2)]
    found = summary(lines)
    assert not found.finished
    assert found.arm("dense").seeds == (0, 1)
    assert found.differences[0].seeds == (0, 1)
    assert found.differences[0].loss_means == pytest.approx((0.515, 0.55))


def test_seeds_not_begun_leave_the_comparison_unfinished() -> None:
    found = summary(twins(seeds=(0, 1, 2, 3)))
    assert not found.finished
    assert {(p.arm, p.seed) for p in found.progress if not p.finished} == {("dense", 3), ("sparse", 3)}
    assert summary(twins()).finished


def test_superseded_lines_do_not_count(tmp_path: Path) -> None:
    lines = twins()
    # Seed 0 of the dense arm ran on to step 20 and finished with nonsense, was then resumed from step 8 and ended well.
    tail = [{"kind": "superseded", "arm": "dense", "seed": 0, "after_step": 8}]
    tail += [step_line("dense", 0, 12, 0.9, 10.0), final_line("dense", 0, 0.50, 0.80)]
    bad = [final_line("dense", 0, 99.0, 0.01), step_line("dense", 0, 19, 77.0, 1e6)]
    cut = [x for x in lines if not (x.get("arm") == "dense" and x.get("seed") == 0 and x["kind"] == "final")]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*cut, *bad, *tail]))
    found = summary(read_records(path)).arm("dense")
    assert found.loss is not None and found.loss.mean == pytest.approx(0.55)
    assert found.seconds is not None and max(found.seconds.values) == 60.0
    assert summary(drop_superseded([*cut, *bad])).arm("dense").loss != found.loss  # the oracle can tell


def test_reference_comes_from_the_config() -> None:
    (d,) = summary(twins(reference="sparse")).differences
    assert (d.arm, d.reference) == ("dense", "sparse")
    assert d.params_total == pytest.approx(100 / 410)


def test_averaged_weights_are_the_result_where_they_exist() -> None:
    def evaluation(weights: str, accuracy: float) -> Line:
        place = {"kind": "eval", "arm": "a", "seed": 0, "step": 1, "split": "val"}
        return {**place, "weights": weights, "accuracy": accuracy}

    found = summary([step_line("a", 0, 1, 1.0, 1.0), evaluation("ema", 0.7), evaluation("model", 0.6)])
    assert found.arm("a").accuracy == Estimate((0.7,), 0.7, None)
    assert found.split == "val"


def test_headline_tells_gains() -> None:
    told = headline(summary(twins(match="flops")))
    assert told.status == ""
    assert told.findings == (
        "At equal training FLOPs, sparse holds 4.10× the parameters of dense (410 against 100). It ended with lower "
        "training loss (0.510 vs 0.550) and no clear difference in accuracy (82.0 vs 80.0 %, +2.0 ± 2.5 points). "
        "It takes 1.25× the time per training image.",
    )
    assert told.basis == "Means ± 95 % t intervals over 3 paired seeds."


def test_headline_tells_losses_and_single_seeds() -> None:
    lines = [run_line(seeds=(0,)), arm_line("dense", 0, 100), arm_line("sparse", 0, 410, flops=75.0)]
    lines += [final_line("dense", 0, 0.5, 0.80), final_line("sparse", 0, 0.6, 0.75)]
    told = headline(summary(lines))
    assert "At equal steps and 1.50× the active FLOPs per image" in told.text
    assert "higher training loss (0.600 vs 0.500) and −5.0 points of accuracy (75.0 vs 80.0 %)" in told.text
    assert "single seed" in told.basis


@pytest.mark.parametrize("gap", [0.0, 4e-4])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_headline_calls_equal_results_equal(seeds: tuple[int, ...], gap: float) -> None:
    lines = [run_line(seeds=seeds)]
    for seed in seeds:
        lines += [arm_line("dense", seed, 100), arm_line("sparse", seed, 410, flops=75.0)]
        lines += [final_line("dense", seed, 1.337, 0.75), final_line("sparse", seed, 1.337 + gap, 0.75 + gap)]
    told = headline(summary(lines)).text
    assert "It ended with equal training loss (1.337 vs 1.337) and equal accuracy (75.0 vs 75.0 %)." in told


def test_equal_is_said_only_where_the_records_bear_it_out() -> None:
    lines = twins(match="flops")
    for line in lines:
        if line["kind"] == "step" and line["arm"] == "sparse":
            line["flops"] *= 1.3
    assert "At 1.30× the training FLOPs" in headline(summary(lines)).text


def test_nothing_recorded_yet() -> None:
    for lines in ([], [{"kind": "run", "command": "train", "name": "r", "config": {}}]):
        found = summary(lines)
        assert found.arms == () and not found.finished
        assert headline(found).text == "No arm has written a record yet."
