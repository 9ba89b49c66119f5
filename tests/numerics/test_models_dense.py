"""The whole model against dense attention with a mask: no windows are cut, nothing is rolled, nothing is shared.

The oracle lets every token score every other and then forbids what shifted windows forbid. It is written from the
papers: windows of a shifted block start half a window in, and are cut off by the edges of the map.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models_oracles import gap, overwrite
from torch import Tensor

from swinmoe.config import ModelConfig, StyleConfig
from swinmoe.models import build_model

STYLES = [
    StyleConfig(norm=norm, similarity=similarity, position_bias=bias, merge_norm=merge)
    for norm, similarity, bias, merge in itertools.product(
        ("pre", "res-post"), ("dot", "cosine"), ("table", "log-cpb", "log-cpb-sigmoid"), ("before", "after")
    )
]
State = dict[str, Tensor]


def base_config(style: StyleConfig, **over) -> ModelConfig:
    values = {
        "style": style,
        "img_size": (32, 32),
        "patch_size": (2, 2),
        "in_chans": 2,
        "num_classes": 3,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": (4, 4),
    }
    return ModelConfig(**(values | over))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def shrunk(cfg: ModelConfig, window: list[int], size: list[int]) -> list[int]:
    if cfg.small_map == "pad":
        return window
    if cfg.window_size[0] == cfg.window_size[1]:
        return [min(window + size)] * 2
    return [min(w, s) for w, s in zip(window, size, strict=True)]


def built_windows(cfg: ModelConfig) -> list[list[int]]:
    """The window of each stage at the configured image size."""
    out = []
    for stage in range(len(cfg.depths)):
        size = [math.ceil(math.ceil(s / p) / 2**stage) for s, p in zip(cfg.img_size, cfg.patch_size, strict=True)]
        out.append(shrunk(cfg, list(cfg.window_size), size))
    return out


def bias_of_offsets(cfg: ModelConfig, state: State, name: str, window: list[int], reference: list[int]) -> Tensor:
    """(2wh-1, 2ww-1, heads)."""
    style = cfg.style
    assert isinstance(style, StyleConfig)
    shape = [2 * w - 1 for w in window]
    if style.position_bias == "table":
        return state[f"{name}.relative_position_bias_table"].reshape(*shape, -1)
    points = torch.zeros(*shape, 2, dtype=torch.float64)
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        for axis, offset in enumerate((i - window[0] + 1, j - window[1] + 1)):
            scaled = 8 * offset / max(1, reference[axis] - 1)
            points[i, j, axis] = math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled)
    hidden = (points @ state[f"{name}.cpb_mlp.0.weight"].T + state[f"{name}.cpb_mlp.0.bias"]).relu()
    bias = hidden @ state[f"{name}.cpb_mlp.2.weight"].T
    return 16 / (1 + (-bias).exp()) if style.position_bias == "log-cpb-sigmoid" else bias


def attention(
    cfg: ModelConfig, state: State, name: str, x: Tensor, heads: int, shifted: bool, built: list[int], ref: list[int]
) -> Tensor:
    style = cfg.style
    assert isinstance(style, StyleConfig)
    batch, *size, dim = x.shape
    window = shrunk(cfg, built, size)
    padded = [math.ceil(s / w) * w for s, w in zip(size, window, strict=True)]
    shift = [w // 2 if shifted and p > w else 0 for w, p in zip(window, padded, strict=True)]
    if cfg.small_map == "shrink" and cfg.window_size[0] == cfg.window_size[1] and min(size) <= window[0]:
        shift = [0, 0]
    canvas = torch.zeros(batch, *padded, dim, dtype=x.dtype)
    canvas[:, : size[0], : size[1]] = x
    ys, xs = (t.flatten() for t in torch.meshgrid(*map(torch.arange, padded), indexing="ij"))
    # Windows of a shifted block lie at shift + k·window; those at the rim are partial.
    wy, wx = (torch.div(t - s, w, rounding_mode="floor") for t, s, w in zip((ys, xs), shift, window, strict=True))
    allowed = (wy[:, None] == wy) & (wx[:, None] == wx)
    real = (ys < size[0]) & (xs < size[1])
    if cfg.pad_keys == "mask":
        allowed &= real[None, :]
    offsets = bias_of_offsets(cfg, state, name, built, ref)
    dy, dx = ((t[:, None] - t).clamp(1 - b, b - 1) + b - 1 for t, b in zip((ys, xs), built, strict=True))
    bias = offsets[dy, dx].permute(2, 0, 1)

    tokens = canvas.flatten(1, 2)
    qkv = tokens @ state[f"{name}.qkv.weight"].T
    if style.similarity == "cosine":
        q_bias, v_bias = state[f"{name}.q_bias"], state[f"{name}.v_bias"]
        qkv = qkv + torch.cat((q_bias, torch.zeros(dim), v_bias))
    else:
        qkv = qkv + state[f"{name}.qkv.bias"]
    q, k, v = (part.unflatten(-1, (heads, dim // heads)).transpose(1, 2) for part in qkv.split(dim, dim=-1))
    if style.similarity == "cosine":
        lengths = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
        cosine = torch.where(lengths > 0, (q @ k.mT) / lengths, 0.0)  # padding has no k, and the cosine 0
        scores = cosine * state[f"{name}.logit_scale"].exp().clamp(max=100)
    else:
        scores = q @ k.mT / math.sqrt(dim // heads)
    scores = (scores + bias)[:, :, real]  # rows of padding are thrown away in the end
    scores = torch.where(allowed[real], scores, -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return (y @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]).unflatten(1, size)


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    x = x @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ state[f"{name}.fc2.weight"].T + state.get(f"{name}.fc2.bias", torch.zeros(()))


def oracle(cfg: ModelConfig, state: State, images: Tensor) -> Tensor:
    style = cfg.style
    assert isinstance(style, StyleConfig)
    (ph, pw), (height, width) = cfg.patch_size, images.shape[-2:]
    images = F.pad(images, (0, math.ceil(width / pw) * pw - width, 0, math.ceil(height / ph) * ph - height))
    patches = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # b c h p w q
    x = torch.einsum("bchpwq,dcpq->bhwd", patches, state["patch_embed.proj.weight"]) + state["patch_embed.proj.bias"]
    if cfg.patch_norm:
        x = norm(state, "patch_embed.norm", x)
    if cfg.absolute_pos_embed:
        x = x + state["absolute_pos_embed"].reshape(1, *x.shape[1:])
    windows = built_windows(cfg)
    for i, depth in enumerate(cfg.depths):
        reference = windows[i]
        if cfg.pretrained_window_sizes:
            given = cfg.pretrained_window_sizes[i]
            reference = [given, given] if isinstance(given, int) else list(given)
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            pre = style.norm == "pre"
            h = norm(state, f"{name}.norm1", x) if pre else x
            h = attention(cfg, state, f"{name}.attn", h, cfg.num_heads[i], j % 2 == 1, windows[i], reference)
            x = x + (h if pre else norm(state, f"{name}.norm1", h))
            h = mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x) if pre else x)
            x = x + (h if pre else norm(state, f"{name}.norm2", h))
            if cfg.extra_norm_every and (j + 1) % cfg.extra_norm_every == 0:
                x = norm(state, f"{name}.norm3", x)
        if i < len(cfg.depths) - 1:
            name = f"layers.{i}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), dim=-1)
            if style.merge_norm == "before":
                x = norm(state, f"{name}.norm", x)
            x = x @ state[f"{name}.reduction.weight"].T
            if style.merge_norm == "after":
                x = norm(state, f"{name}.norm", x)
    features = norm(state, "norm", x).mean((1, 2))
    return features @ state["head.weight"].T + state["head.bias"]


@torch.no_grad()
def assert_equals_oracle(cfg: ModelConfig, *sizes: tuple[int, int]) -> None:
    model = build_model(cfg, dtype=torch.float64).eval()
    overwrite(model)
    for size in sizes:
        images = torch.randn(2, cfg.in_chans, *size, dtype=torch.float64)
        assert gap(model(images).logits, oracle(cfg, model.state_dict(), images)) <= 1e-11, (cfg, size)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Fits the windows; pads both axes; odd maps; one axis, then both, below the window; a single patch.
SIZES = [(32, 32), (35, 22), (18, 38), (6, 40), (5, 3), (2, 2)]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: "-".join((s.norm, s.similarity, s.position_bias, s.merge_norm)))
def test_every_style_equals_dense_attention_with_a_mask(style: StyleConfig) -> None:
    assert_equals_oracle(base_config(style), *SIZES)


@pytest.mark.parametrize("style", [STYLES[0], STYLES[-1]], ids=["v1-like", "v2-like"])
@pytest.mark.parametrize("window", [(4, 4), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("small_map", ["shrink", "pad"])
@pytest.mark.parametrize("pad_keys", ["mask", "attend"])
def test_every_policy_equals_dense_attention_with_a_mask(style, window, small_map, pad_keys) -> None:
    cfg = base_config(style, window_size=window, small_map=small_map, pad_keys=pad_keys)
    assert_equals_oracle(cfg, (32, 32), (35, 22), (6, 40), (5, 3))


def test_rectangular_images_and_odd_options_equal_dense_attention_with_a_mask() -> None:
    style = StyleConfig(norm="res-post", position_bias="log-cpb")
    cfg = base_config(
        style,
        img_size=(24, 38),
        patch_size=(2, 3),
        window_size=(3, 5),
        pretrained_window_sizes=(6, (3, 9)),
        absolute_pos_embed=True,
        extra_norm_every=2,
        mlp_fc2_bias=False,
        patch_norm=False,
        mlp_ratio=2.5,
    )
    assert_equals_oracle(cfg, (24, 38))
    assert_equals_oracle(replace(cfg, pretrained_window_sizes=None, extra_norm_every=1), (24, 38))
