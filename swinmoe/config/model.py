"""What a Swin Transformer is: sizes, style, and where expert layers stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swinmoe.config.checks import above, at_least, at_most, below_one, check_ranges
from swinmoe.config.moe import MoEConfig
from swinmoe.errors import ConfigError, did_you_mean

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StyleConfig:
    """The four axes on which Swin V1, Swin V2 and Microsoft's Swin-MoE differ; any mix is a model."""

    norm: Literal["pre", "res-post"] = "pre"
    """Layer norm before each residual branch (V1), or at its end (V2, Liu et al. 2022, §3.2)."""
    similarity: Literal["dot", "cosine"] = "dot"
    """Scaled dot product, or cosine with a learned, clamped scale (V2 eq. 2)."""
    position_bias: Literal["table", "log-cpb", "log-cpb-sigmoid"] = "table"
    """A learned table (V1); a small MLP on log-spaced offsets (V2 eq. 3-4); the same through 16·sigmoid (V2's code)."""
    merge_norm: Literal["before", "after"] = "before"
    """Patch merging: norm over 4C before the reduction (V1), or over 2C after it (V2)."""


STYLES: dict[str, StyleConfig] = {
    "v1": StyleConfig(),
    "v2": StyleConfig(norm="res-post", similarity="cosine", position_bias="log-cpb-sigmoid", merge_norm="after"),
    "swin_moe": StyleConfig(position_bias="log-cpb"),
}
"""Named points of the style space. `swin_moe` is Microsoft's hybrid: a V1 block with V2's log-CPB, no sigmoid."""


def resolve_style(style: str | StyleConfig) -> StyleConfig:
    """A `StyleConfig` from a name in `STYLES` or from itself; `ConfigError` for an unknown name."""
    if isinstance(style, StyleConfig):
        return style
    if style not in STYLES:
        raise ConfigError(f"unknown style {style!r}; use one of {sorted(STYLES)}")
    return STYLES[style]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Swin Transformer, dense where `moe` is None. Two configs that differ in `moe` only are twins."""

    preset: str = "custom"
    style: StyleConfig | str = "v1"
    img_size: Pair = (224, 224)
    """Height and width that windows are prepared for; other sizes work too."""
    patch_size: Pair = (4, 4)
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: Pair = (7, 7)
    pretrained_window_sizes: tuple[int | Pair, ...] | None = None
    """Log-CPB only: window per stage in pre-training (a side, or height and width), by which offsets are normalised;
    None or 0 = the window itself."""
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    mlp_fc2_bias: bool = True
    """False in Swin-MoE's configs: the dense MLPs have no second bias."""
    patch_norm: bool = True
    absolute_pos_embed: bool = False
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    """Stochastic depth, rising linearly over all blocks from 0 to this rate."""
    extra_norm_every: int = 0
    """V2-H and V2-G: one more norm on the main branch after every so many blocks of a stage (6); 0 = none."""
    res_post_norm_init: float = 0.0
    """Initial weight of the norms that end residual branches (res-post): 0 in V2's code, 1e-5 in its large models."""
    init_std: float = 0.02
    pad_keys: Literal["mask", "attend"] = "mask"
    """Padded positions are hidden from attention, or attended to as torchvision and mmdet do."""
    small_map: Literal["shrink", "pad"] = "shrink"
    """A map smaller than the window: shrink the window (Microsoft), or pad the map (torchvision)."""
    mask_value: float | None = None
    """None: a boolean mask (nothing leaks). -100.0: the additive mask of the original code, for parity only."""
    grad_checkpointing: bool | tuple[int, ...] = False
    """Keep the inputs of blocks only and compute the rest again in the backward pass: everywhere, or in these stages,
    counted from 0."""
    attention_chunks: int | tuple[int, ...] = 1
    """Sequential self-attention (V2 §3.4): windows are worked on in so many chunks, one after the other, and each is
    computed again in the backward pass; one number, or one per stage; 1 = all at once."""
    moe: MoEConfig | None = None
    moe_blocks: tuple[tuple[int, ...], ...] = ()
    """Per stage, the blocks whose MLP becomes an expert layer when `moe` is set; e.g. ((), (), (1, 3, 5), (1,))."""

    def __post_init__(self) -> None:
        resolve_style(self.style)
        side = at_least(1, "give height and width")
        check_ranges(
            self,
            "model",
            img_size=side,
            patch_size=side,
            window_size=side,
            in_chans=at_least(1),
            num_classes=at_least(0, "use 0 for no head"),
            embed_dim=at_least(1),
            pretrained_window_sizes=at_least(0, "use 0 for the window itself"),
            mlp_ratio=above(0),
            drop_rate=below_one(),
            attn_drop_rate=below_one(),
            drop_path_rate=below_one(),
            extra_norm_every=at_least(0, "use 0 for none"),
            res_post_norm_init=at_least(0),
            init_std=at_least(0, "use e.g. 0.02"),
            attention_chunks=at_least(1, "use 1 for all windows at once"),
            mask_value=at_most(0, "use null to hide what is masked entirely"),
        )
        stages = len(self.depths)
        if stages < 1 or any(d < 0 for d in self.depths):
            raise ConfigError(f"model.depths={self.depths} needs at least one stage, each of 0 or more blocks")
        if len(self.num_heads) != stages:
            raise ConfigError(f"model.num_heads={self.num_heads} names {len(self.num_heads)} stages, depths {stages}")
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            if heads < 1 or width % heads:
                raise ConfigError(
                    f"model.num_heads[{stage}]={heads} does not divide the stage's width {width}; "
                    f"use a divisor such as {max(1, width // 32)}"
                )
        if self.img_size[0] < self.patch_size[0] or self.img_size[1] < self.patch_size[1]:
            raise ConfigError(
                f"model.img_size={self.img_size} is smaller than one patch {self.patch_size}; "
                "use larger images or a smaller patch_size"
            )
        if self.pretrained_window_sizes is not None and len(self.pretrained_window_sizes) != stages:
            raise ConfigError(
                f"model.pretrained_window_sizes={self.pretrained_window_sizes} must name one window for each of the "
                f"{stages} stages, or be null"
            )
        self._check_memory_tactics(stages)
        if self.moe is not None and not any(self.moe_blocks):
            raise ConfigError(
                "model.moe is set but model.moe_blocks places no expert layer; e.g. [[], [], [1, 3, 5], [1]]"
            )
        if self.moe_blocks and len(self.moe_blocks) != stages:
            raise ConfigError(f"model.moe_blocks names {len(self.moe_blocks)} stages, depths {stages}; use [] for none")
        for stage, blocks in enumerate(self.moe_blocks):
            for block in blocks:
                if not 0 <= block < self.depths[stage]:
                    raise ConfigError(
                        f"model.moe_blocks[{stage}] names block {block}, but that stage has blocks 0 to "
                        f"{self.depths[stage] - 1}"
                    )
        if self.moe is not None:
            known = self.moe_layer_names()
            for name in self.moe.capacity.layers or {}:
                if name not in known:
                    raise ConfigError(
                        f"model.moe.capacity.layers names {name!r}, which is no expert layer of this model"
                        f"{did_you_mean(name, known)}; its layers are {', '.join(known)}"
                    )

    def _check_memory_tactics(self, stages: int) -> None:
        recomputed = self.grad_checkpointing
        if not isinstance(recomputed, bool) and any(not 0 <= stage < stages for stage in recomputed):
            raise ConfigError(
                f"model.grad_checkpointing={list(recomputed)} names a stage that is not there; use true, false, or "
                f"stages among {list(range(stages))}"
            )
        chunks = self.attention_chunks
        if not isinstance(chunks, int) and len(chunks) != stages:
            raise ConfigError(
                f"model.attention_chunks={list(chunks)} names {len(chunks)} stages, depths {stages}; give one number "
                "for all, or one per stage"
            )

    def recomputes(self, stage: int) -> bool:
        """Whether the blocks of a stage keep their inputs only."""
        recomputed = self.grad_checkpointing
        return recomputed if isinstance(recomputed, bool) else stage in recomputed

    @property
    def recomputes_all(self) -> bool:
        """Whether the blocks of all stages keep their inputs only."""
        return all(self.recomputes(stage) for stage in range(len(self.depths)))

    def chunks_of(self, stage: int) -> int:
        """Chunks that the windows of a stage are worked on in."""
        chunks = self.attention_chunks
        return chunks if isinstance(chunks, int) else chunks[stage]

    def moe_layer_names(self) -> list[str]:
        """Names of the expert layers, in the order of the forward pass; none where `moe` is None."""
        if self.moe is None:
            return []
        return [
            moe_layer_name(stage, block) for stage, blocks in enumerate(self.moe_blocks) for block in sorted(blocks)
        ]


def moe_layer_name(stage: int, block: int) -> str:
    """The module name of the expert layer in a block; initial weights and noise are drawn by it too."""
    return f"layers.{stage}.blocks.{block}.mlp"
