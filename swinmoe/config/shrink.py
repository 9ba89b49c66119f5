"""A run made so small that any machine can step it twice: a check that a recipe holds together."""

from __future__ import annotations

from swinmoe.config.io import build, merge, to_tree, with_overrides
from swinmoe.config.model import ModelConfig, Pair
from swinmoe.config.run import CompareConfig, RunConfig
from swinmoe.errors import ConfigError

CLASSES = 4
STEPS = 2


def shrink(run: RunConfig) -> RunConfig:
    """`run` with the same style, routing, losses and optimiser; a tiny model, a few synthetic images, two steps."""
    batch = 2 * run.train.accumulation * max(2, run.parallel.ep_size)
    changes = {
        "name": f"{run.name}-shrunk",
        "model": _smaller(run.model),
        "data": {
            "name": "synthetic",
            "image_size": [32, 32],
            "channels": run.model.in_chans,
            "synthetic_samples": 4 * batch,
            "synthetic_classes": CLASSES,
            "holdout": 0,
            "shuffle_window": None,
            "workers": 0,
        },
        "schedule": {"warmup_steps": 1},
        "train": {
            "steps": STEPS,
            "epochs": None,
            "batch_size": batch,
            "eval_batch_size": batch,
            "eval_every_epochs": None,
            # fp16 needs a GPU, its stand-in does not
            "precision": "bf16" if run.train.precision == "fp16" else run.train.precision,
        },
        "log": {"every_steps": 1},
    }
    return with_overrides(run, changes)


def shrink_comparison(config: CompareConfig) -> CompareConfig:
    """A comparison with every arm shrunk, one seed, matched on steps."""
    arms = {}
    for name, over in config.arms.items():
        small = to_tree(shrink(build(RunConfig, merge(config.base, over))))
        arms[name] = {k: v for k, v in small.items() if k not in ("name", "seed", "output_dir", "resume")}
    changes = {"name": f"{config.name}-shrunk", "seeds": [config.seeds[0]], "match": "steps", "base": {}, "arms": {}}
    tree = merge(to_tree(config), changes)
    return build(CompareConfig, {**tree, "base": {}, "arms": arms})


def _smaller(model: ModelConfig) -> dict[str, object]:
    """A few blocks of width 16: every stage keeps one expert layer if it had any, and its parity."""
    if len(model.depths) > 4:
        raise ConfigError(f"cannot shrink a model of {len(model.depths)} stages to 32 x 32 pixels; at most 4")
    depths = [min(depth, 2) for depth in model.depths]
    blocks = [
        sorted({min(block, depth - 1) for block in chosen})
        for chosen, depth in zip(model.moe_blocks, depths, strict=False)
    ]
    pretrained = model.pretrained_window_sizes
    return {
        "preset": "custom",
        "img_size": [32, 32],
        "patch_size": [2, 2],
        "embed_dim": 16,
        "depths": depths,
        "num_heads": [2**stage for stage in range(len(depths))],
        "window_size": [4, 4],
        "pretrained_window_sizes": None if pretrained is None else [_at_most(window, 4) for window in pretrained],
        "num_classes": CLASSES,
        "moe_blocks": blocks,
        # Policies of single layers go: the layers they name may be gone.
        **({} if model.moe is None else {"moe": {"capacity": {"layers": None}}}),
    }


def _at_most(window: int | Pair, side: int) -> int | list[int]:
    """A pre-training window, one side or both, no larger than `side`."""
    return min(window, side) if isinstance(window, int) else [min(own, side) for own in window]
