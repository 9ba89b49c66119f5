"""A stage: blocks on one resolution, and the window tables that they share.

Shapes: B images, (H, W) map, D width; maps are (B, H, W, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinmoe.config import ModelConfig, resolve_style
from swinmoe.models.attention import WindowTables
from swinmoe.models.block import SwinBlock
from swinmoe.models.patches import PatchMerging
from swinmoe.models.position import log_offsets, relative_index
from swinmoe.models.windows import WindowGrid, attention_mask, fit_window, window_grid
from swinmoe.moe.types import RoutingStats

Pair = tuple[int, int]


def stage_map(cfg: ModelConfig, stage: int) -> Pair:
    """(H, W) in tokens of a stage's map at the configured image size."""
    factor = 2**stage
    height, width = (-(-side // (patch * factor)) for side, patch in zip(cfg.img_size, cfg.patch_size, strict=True))
    return height, width


def stage_window(cfg: ModelConfig, stage: int) -> Pair:
    """The window a stage is built for: the configured one, shrunk where the configured map is smaller."""
    return fit_window(stage_map(cfg, stage), cfg.window_size, square=_is_square(cfg), small_map=cfg.small_map)


def offset_reference(cfg: ModelConfig, stage: int) -> Pair:
    """The window by which a stage's log-spaced offsets are normalised: that of pre-training, or its own."""
    given = cfg.pretrained_window_sizes[stage] if cfg.pretrained_window_sizes else 0
    if isinstance(given, int):
        given = (given, given)
    return given if min(given) > 0 else stage_window(cfg, stage)


class SwinStage(nn.Module):
    """Blocks, every second one shifted, and the patch merging that follows them (none after the last stage).

    Index, offsets and masks for the configured map are buffers, which move with the module and are not saved, since
    they follow from the configuration. The mask of another map is made once per forward for all blocks.
    """

    index: Tensor
    offsets: Tensor | None
    plain_mask: Tensor | None
    shifted_mask: Tensor | None

    def __init__(self, cfg: ModelConfig, *, stage: int, seed: int) -> None:
        super().__init__()
        self.stage = stage
        window = stage_window(cfg, stage)
        self.blocks = nn.ModuleList(
            SwinBlock(cfg, stage=stage, index=index, window=window, seed=seed) for index in range(cfg.depths[stage])
        )
        self.downsample: PatchMerging | None = None
        if stage < len(cfg.depths) - 1:
            norm_first = resolve_style(cfg.style).merge_norm == "before"
            self.downsample = PatchMerging(cfg.embed_dim * 2**stage, norm_first=norm_first)
        self.grad_checkpointing = cfg.recomputes(stage)
        self.pad_keys = cfg.pad_keys
        self.small_map = cfg.small_map
        self.square = _is_square(cfg)
        self.prepare(cfg, torch.get_default_device(), torch.get_default_dtype())

    def prepare(self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Make the tables for the configured map; offsets get `dtype`."""
        self.map_size = stage_map(cfg, self.stage)
        self.window = stage_window(cfg, self.stage)
        plain, shifted = self._grids(self.map_size)
        offsets = None
        if resolve_style(cfg.style).position_bias != "table":
            offsets = log_offsets(self.window, offset_reference(cfg, self.stage), dtype, device)
        self.register_buffer("index", relative_index(plain.window, self.window, device), persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("plain_mask", attention_mask(plain, self.pad_keys, device), persistent=False)
        self.register_buffer("shifted_mask", attention_mask(shifted, self.pad_keys, device), persistent=False)

    def set_input_size(self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Go over to another image or window size; learned bias tables are cut or interpolated to the new window."""
        old, new = self.window, stage_window(cfg, self.stage)
        for block in self._blocks():
            block.attn.resize_window(old, new)
        self.square = _is_square(cfg)
        self.prepare(cfg, device, dtype)

    def forward(self, x: Tensor, keeps: Sequence[Tensor | None]) -> tuple[Tensor, dict[int, RoutingStats]]:
        """(B, H, W, D) -> the same, before patch merging, and the reports of the blocks that have experts.

        `keeps`: per block, the stochastic-depth factors (2, B) or None.
        """
        tables = self._tables((x.shape[1], x.shape[2]))
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        reports: dict[int, RoutingStats] = {}
        for i, (block, keep) in enumerate(zip(self._blocks(), keeps, strict=True)):
            x, stats = block(x, tables[i % 2], keep, recompute, block.draw_noise(x))
            if stats is not None:
                reports[i] = stats
        return x, reports

    def _blocks(self) -> list[SwinBlock]:
        return [block for block in self.blocks if isinstance(block, SwinBlock)]

    def _grids(self, size: Pair) -> tuple[WindowGrid, WindowGrid]:
        """How unshifted and shifted blocks cut a map of this size."""
        plain, shifted = (
            window_grid(size, self.window, shifted=shifted, square=self.square, small_map=self.small_map)
            for shifted in (False, True)
        )
        return plain, shifted

    def _tables(self, size: Pair) -> tuple[WindowTables, WindowTables]:
        """The tables of unshifted and of shifted blocks for a map of this size."""
        plain, shifted = self._grids(size)
        index, plain_mask, shifted_mask = self.index, self.plain_mask, self.shifted_mask
        if size != self.map_size:
            plain_mask = attention_mask(plain, self.pad_keys, index.device)
            shifted_mask = attention_mask(shifted, self.pad_keys, index.device)
            if index.numel() != plain.area**2:
                index = relative_index(plain.window, self.window, index.device)
        return (
            WindowTables(plain, index, self.offsets, plain_mask),
            WindowTables(shifted, index, self.offsets, shifted_mask),
        )


def _is_square(cfg: ModelConfig) -> bool:
    return cfg.window_size[0] == cfg.window_size[1]
