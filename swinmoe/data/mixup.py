"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) by timm, with draws that belong to the micro-batch.

b images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from torch import Tensor

from swinmoe.config import MixupConfig
from swinmoe.data.draws import isolated_rng
from swinmoe.randomness import derive_seed


class Mixer:
    """Mixes each image of a micro-batch with its mirror in the batch order, all by one draw, as timm's recipes do."""

    def __init__(self, cfg: MixupConfig, *, num_classes: int, label_smoothing: float, seed: int) -> None:
        from timm.data.mixup import Mixup

        self._seed = seed
        self._mixup = Mixup(
            mixup_alpha=cfg.mixup,
            cutmix_alpha=cfg.cutmix,
            prob=cfg.prob,
            switch_prob=cfg.switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    @staticmethod
    def wanted(cfg: MixupConfig) -> bool:
        """Whether the configuration asks for any mixing."""
        return cfg.mixup > 0 or cfg.cutmix > 0

    def __call__(self, images: Tensor, targets: Tensor, *, epoch: int, first: int) -> tuple[Tensor, Tensor]:
        """Mixed images (b, C, H, W), changed in place, and soft targets (b, K) float32.

        Args:
            images: (b, C, H, W), b even.
            targets: (b,) int64.
            epoch, first: epoch and index of the batch's first sample; with the seed, all that the draw depends on.
        """
        with isolated_rng(derive_seed("mixup", self._seed, epoch, first)):
            mixed, soft = self._mixup(images, targets)
        return mixed, soft
