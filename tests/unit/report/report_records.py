"""Realistic records without a training run: a dense and a sparse arm, several seeds, two expert layers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swinmoe.records import RunRecord

LAYERS = ("layers.1.blocks.1.mlp", "layers.2.blocks.1.mlp")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EXPERTS, STEPS, BATCH = 8, 400, 64


def write_records(
    path: Path,
    arms: Sequence[str] = ("dense", "sparse"),
    seeds: Sequence[int] = (0, 1, 2),
    stop_at: int | None = None,
    pictures: bool = True,
    steps: int = STEPS,
    every: int = 10,
) -> Path:
    """A `compare` of `arms` (those beginning with `sparse` have experts); `stop_at` leaves the last seed unfinished."""
    record = RunRecord(path)
    record.write(
        "run",
        command="compare",
        name="fashion twins",
        config=_config(arms, seeds),
        environment=_machine(),
        time="2026-11-20 10:00",
    )
    for seed in seeds:
        for place, arm in enumerate(arms):
            _write_arm(record, arm, place, seed, steps, every, stop_at if seed == seeds[-1] else None, pictures)
    record.write("note", text="Tuned on a validation split with other seeds.")
    return path


def _write_arm(
    record: RunRecord, arm: str, place: int, seed: int, steps: int, every: int, stop_at: int | None, pictures: bool
) -> None:
    rng = np.random.default_rng([place, seed])
    sparse = arm.startswith("sparse")
    flops = 12.31e6 * (1.004 if sparse else 1.0)
    record.write(
        "arm",
        arm=arm,
        seed=seed,
        params_total=5_310_000 if sparse else 1_290_000,
        params_active=1_294_000 if sparse else 1_290_000,
        flops_per_image=flops,
        train_flops_per_image=3 * flops,
        moe_layers=list(LAYERS) if sparse else [],
        num_experts=EXPERTS if sparse else None,
        top_k=1 if sparse else None,
        steps=steps,
        config={"model": {"embed_dim": 48, "moe": {"num_experts": EXPERTS} if sparse else None}, "seed": seed},
    )
    bias = rng.normal(0, 0.7, (len(LAYERS), EXPERTS))
    luck = np.random.default_rng(seed).normal(0, 0.004) + rng.normal(0, 0.0006)  # mostly shared by twins
    seconds = 0.0
    for step in range(1, steps + 1):
        seconds += (0.112 if sparse else 0.1) * math.exp(rng.normal(0, 0.03))
        if stop_at is not None and step > stop_at:
            return
        if step % every:
            continue
        t = step / steps
        loss = 0.5 + 1.8 * math.exp(-9 * t) + 0.15 * (1 - t) - (0.03 * t if sparse else 0) + luck
        spent = {"images": step * BATCH, "flops": 3 * flops * step * BATCH, "seconds": seconds}
        common = {"arm": arm, "seed": seed, "step": step, "epoch": 4 * t, **spent}
        accuracy = 0.885 - 0.6 * math.exp(-6 * t) + (0.011 * t if sparse else 0) - luck
        noisy = loss + rng.normal(0, 0.03 + 0.05 * math.exp(-5 * t))
        record.write(
            "step",
            **common,
            lr=1e-3,
            loss=noisy,
            aux_loss=0.01,
            accuracy=accuracy,
            grad_norm=1.0,
            images_per_second=640.0,
            routing=_routing(rng, bias, t) if sparse else {},
        )
        if step % (steps // 8) == 0:
            record.write(
                "eval",
                **common,
                split="test",
                weights="model",
                loss=loss + 0.02,
                accuracy=accuracy + rng.normal(0, 0.002),
                count=10_000,
                routing={},
            )
    if sparse and pictures:
        _write_pictures(record, arm, seed, steps, rng)
    record.write("final", arm=arm, seed=seed, step=steps, loss=loss, accuracy=accuracy, reason="planned steps done")


def _routing(rng: np.random.Generator, bias: np.ndarray, t: float) -> dict[str, Any]:
    out = {}
    for layer, b in zip(LAYERS, bias, strict=True):
        p = np.exp(b * (1.1 * math.exp(-6 * t) + 0.12) + rng.normal(0, 0.05, EXPERTS))
        if t < 0.15:
            p[3] *= 0.05
        p /= p.sum()
        routed = rng.multinomial(BATCH * 64, p)
        kept = np.minimum(routed, int(1.25 * BATCH * 64 / EXPERTS))
        out[layer] = {
            "routed": routed.tolist(),
            "kept": kept.tolist(),
            "drop_fraction": float(1 - kept.sum() / routed.sum()),
            "token_entropy": 0.95 - 0.5 * t,
            "load_entropy": float(-(p * np.log(p)).sum() / math.log(EXPERTS)),
            "max_over_mean": float(routed.max() / routed.mean()),
            "dead_experts": int((routed < 40).sum()),
            "losses": {"load": 1.1},
        }
    return out


def _write_pictures(record: RunRecord, arm: str, seed: int, step: int, rng: np.random.Generator) -> None:
    y, x = np.mgrid[0:28, 0:28]
    for depth, layer in enumerate(LAYERS):
        images = []
        for index in range(12):
            draw = np.random.default_rng(index)
            cy, cx, r = draw.uniform(11, 17), draw.uniform(11, 17), draw.uniform(6, 11)
            distance = np.hypot((y - cy) * draw.uniform(0.7, 1.3), x - cx)
            picture = (255 * np.clip((r - distance) / 3, 0, 1) * (0.7 + 0.3 * np.sin(x))).astype(np.uint8)
            side = 8 >> depth if depth < 2 else 4
            coarse = np.asarray(Image.fromarray(picture).resize((side, side))).astype(int)
            grid = (coarse // 37 + (np.arange(side)[:, None] > side // 2) * (coarse > 30) + depth) % EXPERTS
            grid[rng.random(grid.shape) < 0.02] = -1
            images.append(
                {
                    "index": index * 7,
                    "label": index % 10,
                    "prediction": (index + (index == 4)) % 10,
                    "png": png_text(picture),
                    "experts": grid.tolist(),
                }
            )
        record.write("samples", arm=arm, seed=seed, step=step, layer=layer, class_names=list(CLASSES), images=images)
        table = rng.dirichlet(np.full(EXPERTS, 1.2 - 0.8 * depth), len(CLASSES)) * 64_000
        record.write(
            "class_expert",
            arm=arm,
            seed=seed,
            step=step,
            layer=layer,
            class_names=list(CLASSES),
            table=table.astype(int).tolist(),
        )


def png_text(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _config(arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    data = {"name": "fashion_mnist", "image_size": [28, 28]}
    return {
        "name": "fashion twins",
        "seeds": list(seeds),
        "match": "flops",
        "reference": arms[0],
        "base": {"data": data, "train": {"epochs": 4, "batch_size": BATCH}},
        "arms": {arm: {} for arm in arms},
    }


def _machine() -> dict[str, Any]:
    return {"python": "3.11.9", "torch": "2.14.1", "machine": {"processor": "x86_64", "cores": 2}, "commit": "06e9f82"}
