"""From a `DataConfig` to a training and an evaluation set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swinmoe.config import DataConfig
from swinmoe.data.dataset import ImageDataset
from swinmoe.data.digits import load_digits
from swinmoe.data.draws import isolated_rng
from swinmoe.data.fashion_mnist import load_fashion_mnist
from swinmoe.data.folder import load_folder
from swinmoe.data.source import RawData
from swinmoe.data.synthetic import load_synthetic
from swinmoe.data.tar_shards import load_tar
from swinmoe.data.zip_map import load_zip
from swinmoe.errors import ConfigError, DataError
from swinmoe.randomness import derive_seed, generator

_LUMA = (0.299, 0.587, 0.114)
_NO_EVALUATION = {
    "folder": "neither a folder 'val' nor 'test'",
    "tar": "neither shards val-*.tar nor test-*.tar, and data.eval_files names none",
    "zip": "neither val_map.txt nor test_map.txt, and data.eval_files names none",
}


@dataclass(frozen=True)
class DataBundle:
    """The two splits of a run and what a model must know about them."""

    train: ImageDataset
    eval: ImageDataset
    eval_split: str
    """`test`, `val`, or `holdout` (cut out of the training images)."""
    num_classes: int
    channels: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """One entry per channel."""
    std: tuple[float, ...]


def build_data(cfg: DataConfig, *, seed: int) -> DataBundle:
    """The data a configuration names, split and with its transforms.

    Args:
        cfg: which images, and how they are prepared.
        seed: of the augmentations. The splits depend on `cfg.holdout_seed` alone.

    Raises:
        DataError: missing or damaged data; the message says where they were sought and how to get them.
        ConfigError: settings that cannot be met.
    """
    # Libraries are imported when first needed, and the import of some (scikit-learn) draws from global random state.
    with isolated_rng(derive_seed("build")):
        return _build(cfg, seed)


def _build(cfg: DataConfig, seed: int) -> DataBundle:
    raw = _load(cfg)
    train, evaluation, split = raw.train, raw.eval, raw.eval_split
    if cfg.holdout:
        if cfg.holdout >= len(train.targets):
            raise ConfigError(
                f"data.holdout={cfg.holdout} would leave none of the {len(train.targets)} training images; use fewer"
            )
        order = torch.randperm(len(train.targets), generator=generator("holdout", cfg.holdout_seed))
        held, kept = order[: cfg.holdout].sort().values, order[cfg.holdout :].sort().values
        train, evaluation, split = train.take(kept), train.take(held), "holdout"
    if evaluation is None:
        raise DataError(
            f"data.root={cfg.root} has {_NO_EVALUATION[cfg.name]}; add one, or set data.holdout to the number of "
            "training images to evaluate on instead"
        )
    if cfg.limit is not None:
        train = train.take(torch.arange(min(cfg.limit, len(train.targets))))
        evaluation = evaluation.take(torch.arange(min(cfg.limit, len(evaluation.targets))))
    channels = cfg.channels or raw.channels
    mean, std = _to_channels(raw.mean, channels), _to_channels(raw.std, channels)
    return DataBundle(
        train=ImageDataset(train, size=cfg.image_size, mean=mean, std=std, augment=cfg.augment, seed=seed),
        eval=ImageDataset(evaluation, size=cfg.image_size, mean=mean, std=std),
        eval_split=split,
        num_classes=len(raw.class_names),
        channels=channels,
        class_names=raw.class_names,
        mean=mean,
        std=std,
    )


def _load(cfg: DataConfig) -> RawData:
    match cfg.name:
        case "digits":
            return load_digits()
        case "fashion_mnist":
            return load_fashion_mnist(cfg.root, download=cfg.download)
        case "folder":
            return load_folder(cfg.root)
        case "synthetic":
            return load_synthetic(cfg)
        case "tar":
            return load_tar(cfg)
        case "zip":
            return load_zip(cfg)


def _to_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel constants for another number of channels: grey repeated, or RGB weighted like the luma itself."""
    if len(values) == channels:
        return values
    if channels == 3:
        return values * 3
    return (sum(weight * value for weight, value in zip(_LUMA, values, strict=True)),)
