from __future__ import annotations

import pytest
import torch

from swinmoe.config import MixupConfig
from swinmoe.data.mixup import Mixer

K, SMOOTHING = 5, 0.1


def _mixer(cfg: MixupConfig, seed: int = 0) -> Mixer:
    return Mixer(cfg, num_classes=K, label_smoothing=SMOOTHING, seed=seed)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([0, 1, 2, 3, 4, 4])


def _smoothed(targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(targets, K) * (1 - SMOOTHING) + SMOOTHING / K


def _share(soft: torch.Tensor) -> float:
    """How much of the first row is its own class, from 0-against-4 labels."""
    return float((soft[0, 0] - SMOOTHING / K) / (1 - SMOOTHING))


def test_mixup_blends_images_as_it_blends_labels() -> None:
    images, targets = _batch()
    mixed, soft = _mixer(MixupConfig(mixup=0.8))(images.clone(), targets, epoch=1, first=7)
    lam = _share(soft)
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
    torch.testing.assert_close(soft, lam * _smoothed(targets) + (1 - lam) * _smoothed(targets.flip(0)))
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_cutmix_pastes_the_area_it_charges_for() -> None:
    images, targets = _batch()
    mixed, soft = _mixer(MixupConfig(cutmix=1.0))(images.clone(), targets, epoch=1, first=7)
    own = (mixed == images).all(1)[0]
    assert torch.equal(torch.where(own, images, images.flip(0)), mixed)
    assert _share(soft) == pytest.approx(own.float().mean().item(), abs=1e-6)
    assert 0 < _share(soft) < 1


def test_without_luck_labels_are_only_smoothed() -> None:
    images, targets = _batch()
    mixed, soft = _mixer(MixupConfig(mixup=0.8, prob=0.0))(images.clone(), targets, epoch=0, first=0)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(soft, _smoothed(targets))


def test_draws_depend_on_seed_epoch_and_first_index_only(rng_untouched) -> None:
    cfg = MixupConfig(mixup=0.8, cutmix=1.0)

    def share(seed: int, epoch: int, first: int) -> float:
        return _share(_mixer(cfg, seed)(*_batch(), epoch=epoch, first=first)[1])

    with rng_untouched():
        base = share(0, 1, 7)
    assert share(0, 1, 7) == base
    assert len({base, share(1, 1, 7), share(0, 2, 7), share(0, 1, 8)}) == 4


def test_mixing_is_wanted_where_a_parameter_is_set() -> None:
    assert not Mixer.wanted(MixupConfig())
    assert Mixer.wanted(MixupConfig(cutmix=1.0))
