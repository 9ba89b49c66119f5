"""The Swin Transformer, dense or sparse, in any of its styles.

Shapes: images (B, C, Y, X); maps (B, H, W, D) inside, (B, D, H, W) as features handed out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from swinmoe.config import ModelConfig
from swinmoe.errors import ConfigError
from swinmoe.models.attention import AttentionImpl, WindowAttention
from swinmoe.models.initial import initialize
from swinmoe.models.layers import linear
from swinmoe.models.patches import PatchEmbed
from swinmoe.models.position import resize_image
from swinmoe.models.stage import SwinStage, offset_reference, stage_map
from swinmoe.moe import MoEMlp
from swinmoe.moe.types import RoutingStats

Pair = tuple[int, int]

NO_DECAY = re.compile(
    r"absolute_pos_embed|relative_position_bias_table|cpb_mlp|logit_scale"
    r"|temperature|projector|sim_matrix|fc1_bias|fc2_bias"
)


@dataclass(frozen=True)
class SwinOutput:
    """What one forward pass returns, dense or sparse."""

    logits: Tensor
    """(B, num_classes); the features themselves where num_classes = 0."""
    features: Tensor
    """(B, D) mean over the normed last map."""
    routing: dict[str, RoutingStats]
    """By expert layer's module name, e.g. "layers.2.blocks.1.mlp"; empty for a dense model."""
    aux_loss: Tensor
    """() the layers' weighted auxiliary losses, summed or averaged as `moe.losses.over_layers` says; 0 if dense."""


register_dataclass(SwinOutput)


class SwinTransformer(nn.Module):
    """A hierarchical vision Transformer with shifted windows (Liu et al. 2021, 2022), its MLPs dense or sparse.

    Parameter names are Microsoft's. Images may have any height and width from one patch upwards. Initial weights depend
    on `seed` and parameter names only; construction leaves the global random state alone.
    """

    absolute_pos_embed: nn.Parameter | None

    def __init__(self, cfg: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = cfg
        self.seed = seed
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.in_chans, cfg.embed_dim, norm=cfg.patch_norm)
        self.absolute_pos_embed = None
        if cfg.absolute_pos_embed:
            height, width = stage_map(cfg, 0)
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, height * width, cfg.embed_dim))
        self.layers = nn.ModuleList(SwinStage(cfg, stage=stage, seed=seed) for stage in range(len(cfg.depths)))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = self._new_head()
        initialize(self, cfg, seed)

    def forward(self, images: Tensor) -> SwinOutput:
        """(B, C, Y, X) -> logits, pooled features, routing reports and their loss.

        Raises:
            ConfigError: another number of channels than the model has, or an image smaller than a patch.
        """
        maps, routing = self._maps(images)
        features = self.norm(maps[-1]).mean((1, 2))
        return SwinOutput(self.head(features), features, routing, self._aux_loss(routing, features.device))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, Y, X) -> the map of each stage, (B, D·2^i, H_i, W_i), before its patch merging and without a norm."""
        maps, _ = self._maps(images)
        return tuple(x.permute(0, 3, 1, 2) for x in maps)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> patches with absolute positions, (B, H, W, D)."""
        self._check(images)
        x: Tensor = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._positions((x.shape[1], x.shape[2]), self.absolute_pos_embed)
        return F.dropout(x, self.config.drop_rate, self.training)

    def _maps(self, images: Tensor) -> tuple[list[Tensor], dict[str, RoutingStats]]:
        # First of all random draws, and for all blocks at once: twins seeded alike drop the same branches, whatever
        # else they draw, and recomputation meets the same factors.
        keeps = self._draw_keeps(images)
        x = self.embed(images)
        maps: list[Tensor] = []
        routing: dict[str, RoutingStats] = {}
        for i, stage in enumerate(self._stages()):
            depth = len(stage.blocks)
            x, reports = stage(x, keeps[:depth])
            keeps = keeps[depth:]
            maps.append(x)
            routing |= {f"layers.{i}.blocks.{j}.mlp": stats for j, stats in reports.items()}
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps, routing

    def _draw_keeps(self, images: Tensor) -> list[Tensor | None]:
        """Stochastic depth: per block the factors (2, B) of its two branches, 0 or 1/(1 - rate); None keeps all.

        The rate rises linearly over all blocks from 0 to `drop_path_rate` (Huang et al. 2016).
        """
        blocks, rate = sum(self.config.depths), self.config.drop_path_rate
        if not self.training or rate == 0:
            return [None] * blocks
        rates = torch.linspace(0, rate, blocks, device=images.device).view(-1, 1, 1)
        kept = torch.rand(blocks, 2, images.shape[0], device=images.device, dtype=rates.dtype) >= rates
        return list((kept / (1 - rates)).to(self.norm.weight.dtype).unbind(0))

    def _aux_loss(self, routing: dict[str, RoutingStats], device: torch.device) -> Tensor:
        moe = self.config.moe
        if moe is None or not routing:
            return torch.zeros((), device=device)
        losses = torch.stack([stats.loss for stats in routing.values()])
        return losses.sum() if moe.losses.over_layers == "sum" else losses.mean()

    def _check(self, images: Tensor) -> None:
        cfg = self.config
        if images.dim() != 4 or images.shape[1] != cfg.in_chans:
            raise ConfigError(
                f"images of shape {tuple(images.shape)} do not fit a model of {cfg.in_chans} channels; give "
                f"(batch, {cfg.in_chans}, height, width), or build the model with in_chans set to theirs"
            )
        if images.shape[2] < cfg.patch_size[0] or images.shape[3] < cfg.patch_size[1]:
            raise ConfigError(
                f"images of {images.shape[2]}x{images.shape[3]} are smaller than one patch of {cfg.patch_size[0]}x"
                f"{cfg.patch_size[1]}; give larger images, or build the model with a smaller patch_size"
            )

    def _positions(self, size: Pair, embedding: Tensor) -> Tensor:
        """Absolute positions of a map of `size`, interpolated where it is not the configured one: (1, H, W, D)."""
        grid = stage_map(self.config, 0)
        if size == grid:
            return embedding.view(1, *size, -1)
        image = embedding.view(1, *grid, -1).permute(0, 3, 1, 2)
        return resize_image(image, size).permute(0, 2, 3, 1)

    def _stages(self) -> list[SwinStage]:
        return [stage for stage in self.layers if isinstance(stage, SwinStage)]

    def _new_head(self) -> nn.Module:
        classes = self.config.num_classes
        return linear(self.num_features, classes) if classes > 0 else nn.Identity()

    # What timm's users expect of a model.

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Width of the last stage."""
        return int(self.config.embed_dim * 2 ** (len(self.config.depths) - 1))

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def img_size(self) -> Pair:
        return self.config.img_size

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and module of each map that `encode` returns."""
        cfg = self.config
        return [
            {"num_chs": cfg.embed_dim * 2**i, "reduction": max(cfg.patch_size) * 2**i, "module": f"layers.{i}"}
            for i in range(len(cfg.depths))
        ]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly drawn head; 0 classes give the pooled features. The only pooling is `avg`.

        Raises:
            ConfigError: another pooling, or a negative number of classes.
        """
        if global_pool not in (None, "avg"):
            raise ConfigError(f"global_pool={global_pool!r} is not offered; use 'avg', or `encode` for unpooled maps")
        if num_classes < 0:
            raise ConfigError(f"num_classes={num_classes} is negative; use 0 for no head")
        self.config = replace(self.config, num_classes=num_classes)
        with self.norm.weight.device:
            self.head = self._new_head()
        self.head.to(self.norm.weight.dtype)
        initialize(self.head, self.config, self.seed, prefix="head")

    def set_input_size(self, img_size: Pair | int | None = None, window_size: Pair | int | None = None) -> None:
        """Prepare the model for another image size, window, or both.

        The function changes as little as it can: log-spaced offsets stay normalised by the window they were before, and
        a learned bias table is cut where the window shrinks and interpolated where it grows. Absolute positions are
        interpolated. Parameters that change their shape are new objects; build the optimiser afterwards.
        """
        old = self.config
        references = tuple(offset_reference(old, stage) for stage in range(len(old.depths)))
        self.config = replace(
            old,
            img_size=old.img_size if img_size is None else _pair(img_size),
            window_size=old.window_size if window_size is None else _pair(window_size),
            pretrained_window_sizes=references,
        )
        if self.absolute_pos_embed is not None and stage_map(old, 0) != stage_map(self.config, 0):
            table = self.absolute_pos_embed.detach().view(1, *stage_map(old, 0), -1).permute(0, 3, 1, 2)
            table = resize_image(table, stage_map(self.config, 0)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
            self.absolute_pos_embed = nn.Parameter(table, requires_grad=self.absolute_pos_embed.requires_grad)
        for stage in self._stages():
            stage.set_input_size(self.config, self.norm.weight.device, self.norm.weight.dtype)

    def set_grad_checkpointing(self, enable: bool | Sequence[int] = True) -> None:
        """Keep only block inputs for the backward pass and recompute the rest: everywhere, nowhere, or in these stages.

        Raises:
            ConfigError: a stage that is not there.
        """
        self.config = replace(self.config, grad_checkpointing=enable if isinstance(enable, bool) else tuple(enable))
        for stage in self._stages():
            stage.grad_checkpointing = self.config.recomputes(stage.stage)

    def set_attention_chunks(self, chunks: int | Sequence[int] = 1) -> None:
        """Work on windows in so many chunks, each recomputed in the backward pass: one number, or one per stage.

        Raises:
            ConfigError: a number below 1, or another number of stages than the model has.
        """
        self.config = replace(self.config, attention_chunks=chunks if isinstance(chunks, int) else tuple(chunks))
        for stage in self._stages():
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.chunks = self.config.chunks_of(stage.stage)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters for layer-wise rates; merging belongs to the block before it."""
        if coarse:
            blocks: Any = r"^layers\.(\d+)"
        else:
            merges = [
                (rf"^layers\.({i})\.downsample", (max(depth - 1, 0),)) for i, depth in enumerate(self.config.depths)
            ]
            blocks = [*merges, (r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^absolute_pos_embed|^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must spare by their role; 1-D ones and biases are the optimiser's rule.

        As in Swin's and Swin-MoE's recipes: position tables and MLPs, logit scales, the cosine router's parts and the
        experts' biases. A linear router's matrix does decay.
        """
        return {name for name, _ in self.named_parameters() if NO_DECAY.search(name)}

    def moe_layers(self) -> dict[str, MoEMlp]:
        """The expert layers by module name, in the order of the forward pass."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoEMlp)}

    def set_attention_impl(self, impl: AttentionImpl) -> None:
        """Choose `explicit`, `sdpa` or `auto` attention in all blocks."""
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.attention_impl = impl

    def prepare_tables(self) -> None:
        """Make the window tables anew on the weights' device and in their dtype: after `to_empty`, or another dtype."""
        for stage in self._stages():
            stage.prepare(self.config, self.norm.weight.device, self.norm.weight.dtype)


def _pair(value: Pair | int) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
