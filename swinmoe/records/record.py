"""An append-only JSONL file in which a run writes down what happened, and its reader.

Every line is one JSON object with a `kind`:

- `run`: command, name, config (resolved), environment (versions, machine, commit), time
- `arm`: arm, seed, params_total, params_active, flops_per_image (forward), train_flops_per_image, moe_layers (names),
  num_experts, top_k, dispatcher (in use on rank 0), dispatcher_reason (why `auto` took it),
  experts_in_kernel (whether experts take our kernel in C++), experts_in_kernel_reason (why not), compiled (names of
  blocks), steps (planned), config
- `load`: arm, seed, source, weights (`model` or `average`), loaded, unused, missing (names), resized, reinitialised
  (name -> how), upcycled, freeze (the policy), frozen (names): what fine-tuning began with
- `step`: arm, seed, step (1-based, optimiser steps), epoch, lr, loss, aux_loss, accuracy, grad_norm, images, flops,
  seconds (all three cumulative), images_per_second, data_wait, mfu, peak_memory_bytes, routing
- `capacity`: arm, seed, step, layers (name -> {need, before, after}): adaptive capacity factors changed by that step
- `eval`: arm, seed, step, epoch, split, weights (`model` or `ema`), loss, accuracy, count, images, flops, seconds,
  routing
- `samples`: arm, seed, step, layer, class_names, images: list of {index, label, prediction, png (base64), experts (grid
  of expert ids, -1 dropped)}
- `class_expert`: arm, seed, step, layer, class_names, table (classes x experts, token counts)
- `final`: arm, seed, step, loss, accuracy, reason (why the arm stopped)
- `superseded`: arm, seed, after_step: earlier lines of that arm and seed with a larger step count no more
- `note`: text
- `profile`: what (`layer`, `exchange` or `model`), command, workload (flat: settings, each value or list of values),
  environment, time: what the `measurement` lines after it belong to
- `measurement`: see below

`routing` maps a layer's name to {routed, kept (lists over experts), drop_fraction, token_entropy, load_entropy,
max_over_mean, dead_experts, losses}; of a layer with adaptive capacity, in `step`, also capacity_factor (that stands),
capacity_need (the largest since the line before) and capacity_beyond (passes that needed more than what stood).
Non-finite numbers are written as null.

A `measurement` is one way of doing something, timed in turns with others (`swinmoe.profiling`). Where something does
not apply or was not measured, its key is null or missing. Times are milliseconds of the slowest rank; counts and FLOPs
are over all ranks, bytes those of one (the mean, for memory the one with the highest peak).

- what, name (unique in the file), variant (flat: dispatcher (`dense` for a baseline), num_experts, top_k, capacity,
  ep_size, world, chunks, exchange, skew, ...; of a model also what a sweep varies besides, as `key.of.run`), baseline
  (the name of the measurement to compare with)
- ms {median, low, high (the median's 95 % interval; of fewer than six rounds the range), rounds}; of a model also p95,
  images_per_second
- phases: {pass: {phase: ms}}, passes `forward`, `backward`, of a model `update`; phases route, scatter, exchange_out,
  experts, exchange_back, gather, other; of a model also attention, mlp (dense ones), optimizer. instrumented_ms: their
  sum, the same step with its phases marked
- exchange_ms: the same rows' exchange alone, forward and backward; of a model those of all layers and micro-batches one
  after another, recomputed passes too; exposed_ms: the step's time in exchanges (copies, launches, waiting, for slower
  ranks too); hidden_ms: max(0, exchange_ms - exposed_ms), what other work covered
- experts_in_kernel, experts_in_kernel_reason: whether experts take our kernel in C++, and why not; null off the CPU
- balanced_ms: the same step with balance forced
- run: of a model, its whole configuration, so that a plan can be held against the step
- rows {routed, kept, computed}: choices, those not dropped, rows that experts multiplied (with padding)
- flops {model, hardware, dense_equivalent}; gemm_flops_per_second (of a bare product in the same rounds);
  utilisation {model, hardware}: FLOPs over ranks, time and that rate
- bytes_sent: to other ranks, of one step (counts, statistics and a model's sums of gradients too); exchange_bytes: of
  the exchange alone; bandwidth: those per second of exchange_ms; ranks: of its group
- memory {dense, experts, optimizer, dispatch, activations, peak}: bytes, see `swinmoe.profiling.memory`
- of what=exchange (one way, forward or backward): calls (exchanges within a turn; ms is of one), message_bytes (that
  travel from a rank to each, the mean), algbw (bytes per second of all of a rank's rows), busbw (algbw·(n - 1)/n, n =
  ranks), busiest_bytes (that enter or leave the rank at which most do)
- of what=capacity: factors (layer -> factor, null for dropless), images, batches, accuracy, drop_fraction, drops (by
  layer); variant {mode (`train` or `eval`), capacity, batch_prioritized}

`fit` is what explains the times of even exchanges (`swinmoe.profiling.link`): what, name, variant (ep_size null: of
several group sizes at once), latency_seconds, bandwidth, half_message, half_bandwidth_bytes (the message_bytes that
reach half of it, latency counted), latency_error, bandwidth_error (standard errors over the values), typical_error,
worst_error (relative, of times), points: list of {name, message_bytes, ranks, seconds, predicted, error}

`swinmoe tune` writes besides

- `expert_loads`: mode, layer, top_k, tokens (of each batch), routed (batches x experts, choices before drops): what the
  dropless pass over the batches for choosing saw, step by step, in each step by process; expert_imbalance (the busiest
  expert's over the mean, mean over batches), rank_imbalance (likewise of the ep_size ranks that share the experts, over
  so many batches together as meet there; null where ep_size is 1), ep_size, together
- `drop_curve`: mode, layer, factors, drops: the share of choices that each factor drops of a dropless pass's loads
- `recommendation`, capacity: mode, asked, factors, batch_prioritized, separate (checked on other images than chosen
  on), chosen, checked, dropless (as a measurement's), ms {recommended, dropless, now}, failures (what was not kept)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swinmoe.errors import CheckpointError

RECORD_KINDS: tuple[str, ...] = ("run", "arm", "load", "step", "capacity", "eval", "samples", "class_expert", "final")
RECORD_KINDS += ("superseded", "note", "profile", "measurement", "fit", "expert_loads", "drop_curve", "recommendation")
Line = dict[str, Any]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


class RunRecord:
    """Writes one JSONL file, line by line, each flushed; a line cut off by a kill is repaired on reopening.

    Only the main process writes; on others construct it with `path=None`, and `write` does nothing.
    """

    def __init__(self, path: Path | str | None) -> None:
        self.path = Path(path) if path is not None else None
        if self.path is not None:
            _cut_partial_line(self.path)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record of a known kind."""
        if kind not in RECORD_KINDS:
            raise ValueError(f"record kind {kind!r} is not one of {RECORD_KINDS}")
        if self.path is None:
            return
        line = json.dumps({"kind": kind, **_finite(values)}, separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def _cut_partial_line(path: Path) -> None:
    """Drop the tail after the last newline: a process killed while writing leaves half a line there."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[Line]:
    with path.open() as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return  # still being written, or cut off by a kill
            try:
                yield json.loads(text)
            except json.JSONDecodeError as error:
                raise CheckpointError(
                    f"{path}: line {number} is not JSON ({error.msg}); the records file is damaged"
                ) from error


def read_records(path: Path | str) -> list[Line]:
    """All lines that still count, in order: those made obsolete by a later `superseded` line are left out."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no records at {str(path)!r}; a run writes records.jsonl into its output folder")
    return drop_superseded(_lines(path))


def drop_superseded(lines: Iterable[Line]) -> list[Line]:
    """`lines` without those that a later `superseded` record withdraws, and without those records themselves."""
    kept: list[Line] = []
    for line in lines:
        if line["kind"] == "superseded":
            owner, limit = (line.get("arm"), line.get("seed")), line["after_step"]
            kept = [k for k in kept if (k.get("arm"), k.get("seed")) != owner or k.get("step", 0) <= limit]
        else:
            kept.append(line)
    return kept
