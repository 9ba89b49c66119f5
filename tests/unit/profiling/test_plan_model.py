"""The performance model by hand and by what must hold for every machine: more is never faster."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.errors import ConfigError
from swinmoe.models import build_model
from swinmoe.profiling.plan.cost import KINDS, Cost
from swinmoe.profiling.plan.exchange import (
    Layout,
    all_gather,
    all_reduce,
    all_to_all,
    gather_few,
    layout,
    overlapped,
    sum_few,
    two_stage_all_to_all,
)
from swinmoe.profiling.plan.hardware import Figure, Hardware, Link, Sharing, known_hardware, load_hardware
from swinmoe.profiling.plan.predict import Scene, at_batch, predict, spreads_of
from swinmoe.profiling.plan.refine import Measured, refine
from swinmoe.profiling.plan.search import layouts, search
from swinmoe.profiling.plan.tensors import dealt
from swinmoe.profiling.plan.work import expert_layers

MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "patch_size": 2,
    "window_size": 4,
    "img_size": 32,
    "moe": {"num_experts": 8},
    "moe_blocks": [[1], [1]],
}


MACHINES = {name: load_hardware(name) for name in ("a100", "h100", "cpu")}
H100, CPU = MACHINES["h100"], MACHINES["cpu"]


def run_of(**sections: Any) -> RunConfig:
    return build(RunConfig, {"model": MODEL, "train": {"batch_size": 512}} | sections)


def link(latency: float, bandwidth: float, half: float = 0.0) -> Link:
    return Link(
        latency=Figure(value=latency, source="test"),
        bandwidth=Figure(value=bandwidth, source="test"),
        half_message=Figure(value=half, source="test"),
    )


def machine(inside: Link, between: Link, node: int) -> Hardware:
    return replace(load_hardware("a100"), inside=inside, between=between, processes_per_node=node)


# ------------------------------------------------------------------------------------------------------------ hardware


@pytest.mark.parametrize("name", ["a100", "cpu", "h100"])
def test_every_figure_has_a_source_and_survives_yaml(name: str, tmp_path: Path) -> None:
    hardware = load_hardware(name)
    file = tmp_path / "copy.yaml"
    file.write_text(hardware.as_yaml(), encoding="utf-8")
    assert load_hardware(str(file)) == hardware
    assert all(len(leaf["source"]) > 5 for leaf in leaves(yaml.safe_load(file.read_text())))
    assert name in known_hardware()


def leaves(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in leaves(item)]
    if not isinstance(tree, dict):
        return []
    return [tree] if "value" in tree else [leaf for item in tree.values() for leaf in leaves(item)]


def test_a_message_of_half_size_reaches_half_the_bandwidth() -> None:
    one = link(1e-5, 1e9, half=4096)
    assert one.at(4096) == 5e8
    assert one.seconds(3, 4096) == pytest.approx(1e-5 + 3 * 4096 / one.at(4096))
    assert one.seconds(0, 4096) == 0


def test_time_of_work_is_the_sum_of_counts_over_rates() -> None:
    hardware = load_hardware("cpu")
    for kind in KINDS:
        cost = Cost(**{kind: 1e9})
        if kind == "calls":
            expected = 1e9 * hardware.call.value
        else:
            expected = 1e9 / (
                hardware.flops_per_second("fp32") if kind == "flops" else getattr(hardware.rates, kind).value
            )
        assert hardware.seconds(cost, "fp32") == pytest.approx(expected)


def test_sharing_is_linear_between_figures_and_even_beyond() -> None:
    figures = tuple(Sharing(processes=n, slowdown=Figure(value=v, source="test")) for n, v in ((1, 1.0), (3, 2.0)))
    hardware = replace(load_hardware("cpu"), sharing=figures)
    assert [hardware.slowdown(n) for n in (1, 2, 3, 6)] == [1.0, 1.5, 2.0, 4.0]


def in_lockstep(times: float) -> Hardware:
    one = Figure(value=1.0, source="test")
    return replace(CPU, sharing=(Sharing(processes=2, slowdown=one, lockstep=replace(one, value=times)),))


def test_lockstep_slows_what_ranks_compute_between_meetings() -> None:
    """By hand: of all work where rows travel, of the forward pass where statistics alone are summed, of none where
    ranks meet at the end."""
    for changes, share in (
        ({"parallel": {"ep_size": 2}}, "all"),
        ({"parallel": {"ep_size": 2, "weight_group": 2}}, "all"),
        ({}, "some"),
        ({"model": MODEL | {"moe": {"num_experts": 8, "losses": {"batch": "local"}}}}, "none"),
        ({"model": {k: v for k, v in MODEL.items() if not k.startswith("moe")}}, "none"),
    ):
        before, after = (predict(run_of(**changes), Scene(in_lockstep(times), 2)) for times in (1.0, 1.5))
        work = before.dense + before.experts + before.moe_other
        more = after.seconds - before.seconds
        assert after.exchange - before.exchange == pytest.approx(more)
        if share == "some":
            assert 0.25 * work < more / 0.5 < 0.45 * work
        else:
            assert more == pytest.approx(0.5 * work if share == "all" else 0.0)


def test_lockstep_is_linear_between_figures_and_stays_beyond() -> None:
    one = Figure(value=1.0, source="test")
    figures = tuple(
        Sharing(processes=n, slowdown=one, lockstep=None if v is None else Figure(value=v, source="test"))
        for n, v in ((1, None), (2, 1.2), (4, 1.6))
    )
    hardware = replace(CPU, sharing=figures)
    assert [hardware.lockstep(n) for n in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.6])
    assert H100.lockstep(8) == 1.0


def test_few_numbers_go_through_shared_memory() -> None:
    hardware = replace(machine(link(1.0, 10.0), link(9.0, 10.0), 4), shared=link(0.5, 100.0))
    here, apart = layout(4, 1, 4), layout(8, 1, 4)
    assert gather_few(here, 10, hardware) == pytest.approx(0.5 + 3 * 10 / 100)
    assert sum_few(here, 10, hardware) == gather_few(here, 10, hardware)
    assert gather_few(here, 2**15, hardware) == all_gather(here, 2**15, hardware)  # too many
    assert sum_few(apart, 10, hardware) == all_reduce(apart, 10, hardware)
    assert sum_few(here, 10, replace(hardware, shared=None)) == all_reduce(here, 10, hardware)
    assert sum_few(layout(1, 1, 4), 10, hardware) == 0


def test_links_are_those_of_as_many_processes_or_of_the_next_known_number() -> None:
    hardware = load_hardware("cpu")
    slow = hardware.inside.latency.value

    def link(times: float) -> Link:
        return replace(hardware.inside, latency=Figure(value=slow * times, source="test"))

    one = Figure(value=1.0, source="test")
    figures = [Sharing(processes=1, slowdown=one)]
    figures += [Sharing(processes=n, slowdown=one, inside=link(n), shared=link(n / 2)) for n in (2, 4)]
    known = replace(hardware, sharing=tuple(figures))
    found = [known.among(n) for n in (1, 2, 3, 4, 8)]
    assert [round(h.inside.latency.value / slow) for h in found] == [2, 2, 4, 4, 4]
    assert [round(h.neighbours.latency.value / slow) for h in found] == [1, 1, 2, 2, 2]
    assert hardware.among(2) == hardware


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratess": {}}, "did you mean 'rates'"),
        ({"overlap": {"value": 1.5, "source": "x"}}, "overlap=1.5 at most 1"),
        ({"memory": {"value": 0, "source": "x"}}, "memory=0 must be above 0"),
        ({"call": {"value": 1}}, "source"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = yaml.safe_load(load_hardware("cpu").as_yaml()) | change
    file = tmp_path / "odd.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_hardware(str(file))


def test_an_unknown_machine_names_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"--hardware h10: .*'h100'.*--calibrate"):
        load_hardware("h10")


# ------------------------------------------------------------------------------------------------------------ exchange


def test_groups_lie_on_nodes() -> None:
    assert layout(8, 1, 8) == Layout(8, 8)
    assert layout(32, 1, 8) == Layout(32, 8)
    assert layout(4, 8, 8) == Layout(4, 1)
    assert layout(16, 2, 8) == Layout(16, 4)
    assert layout(16, 2, 8).nodes == 4


def test_a_flat_exchange_by_hand() -> None:
    """2 nodes of 2 ranks, 4 MB: one message inside of 1 MB at 1 GB/s, two between at 100 MB/s, at the same time."""
    hardware = machine(link(1e-3, 1e9), link(2e-3, 1e8), node=2)
    assert all_to_all(Layout(4, 2), 4e6, hardware) == pytest.approx(1e-3 + 2e-3 + max(1e-3, 2e-2))
    assert all_to_all(Layout(1, 1), 4e6, hardware) == 0


def test_a_staged_exchange_by_hand() -> None:
    hardware = machine(link(1e-3, 1e9), link(2e-3, 1e8), node=2)
    copies = 4 * 4e6 / hardware.rates.rows.value
    expected = 1e-3 + 2e6 / 1e9 + 2e-3 + 2e6 / 1e8 + copies
    assert two_stage_all_to_all(Layout(4, 2), 4e6, hardware, "fp32") == pytest.approx(expected)


def test_rows_may_travel_within_a_node_by_a_link_of_their_own() -> None:
    hardware = replace(machine(link(1e-3, 1e9), link(2e-3, 1e8), node=2), shared=link(0, 1e10))
    assert all_to_all(Layout(2, 2), 4e6, hardware) == pytest.approx(2e6 / 1e10)
    assert all_to_all(Layout(4, 2), 4e6, hardware) == pytest.approx(1e-3 + 2e-3 + max(1e-3, 2e-2))  # not between nodes
    copies = 4 * 4e6 / hardware.rates.rows.value
    staged = 2e6 / 1e10 + 2e-3 + 2e6 / 1e8 + copies
    assert two_stage_all_to_all(Layout(4, 2), 4e6, hardware, "fp32") == pytest.approx(staged)


def test_two_stages_win_where_messages_are_small_and_many() -> None:
    hardware = H100
    at = layout(512, 1, 8)
    small, large = 512 * 1e3, 512 * 1e8
    assert two_stage_all_to_all(at, small, hardware, "bf16") < all_to_all(at, small, hardware)
    assert two_stage_all_to_all(at, large, hardware, "bf16") > all_to_all(at, large, hardware)


def test_sums_and_gathers_by_hand() -> None:
    hardware = machine(link(1e-3, 1e9), link(2e-3, 1e8), node=2)
    assert all_gather(Layout(2, 2), 1e6, hardware) == pytest.approx(1e-3 + 1e-3)
    # 4 ranks, 2 in each node, whose 2 adapters make 200 MB/s; ring of 3 rounds, latencies of a tree's 2
    assert all_gather(Layout(4, 2), 1e6, hardware) == pytest.approx(2 * 2e-3 + 3e6 / 2e8)
    assert all_reduce(Layout(4, 2), 4e6, hardware) == pytest.approx(2 * (2 * 2e-3 + 3e6 / 2e8))
    slow = replace(hardware, device="cpu")
    assert all_reduce(Layout(4, 2), 4e6, slow) == pytest.approx(2 * (3 * 2e-3 + 3e6 / 2e8))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.floats(1, 1e9), st.floats(1, 2))
def test_larger_messages_never_travel_faster(power: int, volume: float, more: float) -> None:
    hardware, at = H100, layout(2**power, 1, 8)
    for way in (all_to_all, all_gather, all_reduce):
        assert way(at, more * volume, hardware) >= way(at, volume, hardware) > 0


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 8), st.floats(0, 1))
def test_overlap_hides_no_more_than_there_is(transfer: float, work: float, chunks: int, hidden: float) -> None:
    line = overlapped(transfer / chunks, work / chunks, chunks, hidden)
    assert max(transfer, work) - 1e-12 <= line <= transfer + work + 1e-12


# ------------------------------------------------------------------------------------------------------- predictions


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["a100", "h100", "cpu"]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 64))
def test_more_images_take_longer_and_more_memory(name: str, ep: int, images: int) -> None:
    scene = Scene(MACHINES[name], 8, imbalance=1.0)
    run = run_of(parallel={"ep_size": ep})
    less, more = (predict(at_batch(run, 8, n), scene) for n in (images, images + 1))
    assert less.seconds < more.seconds
    assert less.memory.total < more.memory.total


@settings(deadline=None, max_examples=25)
@given(st.floats(1, 4), st.floats(1, 4))
def test_imbalance_never_helps(first: float, second: float) -> None:
    low, high = sorted((first, second))
    run = run_of(parallel={"ep_size": 4})
    less, more = (predict(run, Scene(H100, 8, imbalance=n)) for n in (low, high))
    assert less.seconds <= more.seconds


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(KINDS[1:-1]), st.floats(1, 10))
def test_a_slower_machine_is_never_faster(kind: str, factor: float) -> None:
    hardware = CPU
    run = run_of(parallel={"ep_size": 2})
    assert (
        predict(run, Scene(hardware.scaled("slower", factor, kind), 2)).seconds
        >= predict(run, Scene(hardware, 2)).seconds
    )


def test_the_parts_of_a_step_make_the_whole() -> None:
    for parallel in ({"ep_size": 1}, {"ep_size": 8, "chunks": 2}, {"ep_size": 8, "weight_group": 8}):
        p = predict(run_of(parallel=parallel), Scene(H100, 16))
        assert p.seconds == pytest.approx(p.dense + p.experts + p.moe_other + p.exchange + p.sync + p.update)
        assert min(p.dense, p.experts, p.moe_other, p.update) > 0
        assert (p.exchange > 0) == (p.world > 1)


def test_recomputing_trades_time_for_memory() -> None:
    scene = Scene(MACHINES["a100"], 8)
    kept, again, stage, turns, host = (
        predict(run_of(model={**MODEL, **model}, train={"batch_size": 4096, **train}), scene)
        for model, train in (
            ({}, {}),
            ({"grad_checkpointing": True}, {}),
            ({"grad_checkpointing": [0]}, {}),
            ({"attention_chunks": 4}, {}),
            ({}, {"offload_activations": True}),
        )
    )
    assert kept.seconds < stage.seconds < again.seconds and kept.seconds < turns.seconds
    assert again.memory.activations < stage.memory.activations < kept.memory.activations
    assert host.memory.activations == 0 and host.seconds > kept.seconds


def test_zero_and_fsdp_divide_what_they_say() -> None:
    scene = Scene(MACHINES["a100"], 8)
    dense = {key: value for key, value in MODEL.items() if not key.startswith("moe")}
    plain, zero, fsdp = (
        predict(run_of(model=dense, parallel=parallel), scene).memory
        for parallel in ({}, {"zero": True}, {"shard_dense": True})
    )
    sizes = [p.numel() for p in build_model(run_of(model=dense).model, device="meta").parameters()]
    # Tensors are not divided: the largest bounds how even the shares can be.
    assert max(2 * 4 * max(sizes), plain.moments / 8) <= zero.moments < plain.moments / 2
    assert zero.gradients == plain.gradients and zero.dense == plain.dense
    # Rows of narrow tensors do not divide by 8 without a rest.
    for own, whole in ((fsdp.moments, plain.moments), (fsdp.gradients, plain.gradients), (fsdp.dense, plain.dense)):
        assert whole / 8 <= own < 1.05 * whole / 8


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_zero_gives_whole_tensors_to_whoever_has_least(ranks: int) -> None:
    groups = [[7, 96, 96, 5, 31], [1, 1, 2, 3, 5, 8], []]
    loads = [0] * ranks
    for group in groups:
        for size in sorted(group, reverse=True):
            loads[loads.index(min(loads))] += size
    assert dealt(groups, ranks) == loads and sum(loads) == sum(map(sum, groups))


def test_every_layer_is_planned_with_its_own_capacity() -> None:
    """Rows, and with them time and traffic, of two layers: as of two models that have either capacity everywhere."""
    scene = Scene(MACHINES["a100"], 8)

    def rows(capacity: dict[str, Any]) -> list[float]:
        moe = {**MODEL["moe"], "dispatcher": "padded", "capacity": capacity}
        run = run_of(model={**MODEL, "moe": moe}, parallel={"ep_size": 2})
        return [spread.rows for spread in spreads_of(run, scene, 16)]

    wide, narrow = ({"kind": "fixed", "factor": factor} for factor in (2.0, 0.5))
    first, *_ = (layer.name for layer in expert_layers(run_of().model))
    mixed = rows({"train": wide, "layers": {first: {"train": narrow}}})
    assert mixed == [rows({"train": narrow})[0], *rows({"train": wide})[1:]]
    assert mixed[0] < rows({"train": wide})[0]


@pytest.mark.parametrize(
    ("world", "batch", "message"),
    [
        (3, None, r"train.batch_size=512 cannot be split evenly over 3 ranks .* multiple of 3"),
        (2, 0, r"--batch 0: images of each rank"),
    ],
)
def test_batches_that_cannot_be_are_refused(world: int, batch: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(at_batch(run_of(), world, batch), Scene(H100, world))


def test_links_that_nobody_measured_are_not_taken_for_free() -> None:
    nowhere = link(0.0, 1e18)
    alone = machine(nowhere, nowhere, node=2)
    assert predict(run_of(), Scene(alone, 1)).seconds > 0
    with pytest.raises(ConfigError, match=r"how 2 ranks send to each other.*--processes N.*fill in inside"):
        predict(run_of(), Scene(alone, 2))
    joined = machine(link(1e-5, 1e10), nowhere, node=2)
    assert predict(run_of(), Scene(joined, 2)).seconds > 0
    with pytest.raises(ConfigError, match=r"how 4 ranks send to each other.*fill in between"):
        predict(run_of(), Scene(joined, 4))


def test_ranks_that_expert_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.ep_size=8 does not divide 4 ranks"):
        predict(run_of(parallel={"ep_size": 8}), Scene(H100, 4))


# ------------------------------------------------------------------------------------------------------------- search


def test_every_way_is_tried_once_and_can_be_built() -> None:
    run = run_of()
    ways = list(layouts(run, Scene(H100, 16)))
    assert len(set(ways)) == len(ways)
    assert {way.ep_size for way in ways} == {1, 2, 4, 8, 16}
    assert {way.exchange for way in ways} == {"flat", "2dh"}
    for way in ways:
        build(RunConfig, {"model": MODEL, "parallel": {f: getattr(way, f) for f in ("ep_size", "weight_group")}})


def test_the_best_is_the_fastest_that_fits() -> None:
    options = search(run_of(), Scene(H100, 16))
    fitting = [option for option in options if option.prediction.fits]
    assert options[0].prediction.seconds == min(option.prediction.seconds for option in fitting)


def test_what_does_not_fit_is_made_to_fit_or_said_not_to() -> None:
    hardware = H100
    run = run_of(train={"batch_size": 64})
    roomy = search(run, Scene(hardware, 1))[0].prediction.memory

    def with_memory(size: float) -> Hardware:
        return replace(hardware, memory=Figure(value=hardware.reserved.value + size, source="test"))

    tight = search(run, Scene(with_memory(0.7 * roomy.total), 1))[0]
    assert tight.prediction.fits
    assert tight.prediction.micro_batches > 1 or tight.run.model.grad_checkpointing
    never = search(run, Scene(with_memory(roomy.moments), 1))
    assert not any(option.prediction.fits for option in never)


# ------------------------------------------------------------------------------------------------------------- refine


def test_factors_of_a_machine_are_found_from_its_steps() -> None:
    """Steps of a machine whose products and sums are slower than described give back just that."""
    described = CPU
    true = described.scaled("true", 2.0, "fp32", "products").scaled("true", 3.0, "copy", "norm", "activation")
    runs = [
        run_of(model={**MODEL, "embed_dim": width, "num_heads": [1, 2]}, train={"batch_size": batch})
        for width in (8, 32, 128)
        for batch in (4, 64)
    ]
    steps = [Measured(run, 1, predict(run, Scene(true, 1)).seconds) for run in runs]
    found, factors = refine(described, steps)
    held = run_of(model={**MODEL, "embed_dim": 64}, train={"batch_size": 24})
    wanted = predict(held, Scene(true, 1)).seconds
    before, after = (abs(predict(held, Scene(h, 1)).seconds / wanted - 1) for h in (described, found))
    assert after < 0.05 < before
    assert math.isclose(factors["update"], 1, rel_tol=0.3)
