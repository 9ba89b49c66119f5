"""Test images with each patch in the colour of the expert that took it, drawn pixel by pixel.

Shapes: (h, w) grid of expert ids, -1 where the token was dropped; pictures are square cells of CELL pixels.
"""

from __future__ import annotations

import base64
import binascii
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont, UnidentifiedImageError

from swinmoe.report.series import Line, select
from swinmoe.report.theme import Theme, shorten

CELL = 168
GAP = 10
PER_ROW = 12
_NAMED = ("#3f8fd6", "#f2a33a", "#35b779", "#d7609f", "#f0e05a", "#7ad3f0", "#d1495b", "#9a7bd9")
"""Eight hues told apart by people with colour-vision deficiencies too, since their lightness differs as well."""


@dataclass(frozen=True)
class Sample:
    """One image and what each layer's router did with its patches."""

    picture: Image.Image
    label: str
    prediction: str | None
    grids: dict[str, NDArray[np.int64]]
    """Layer -> (h, w)."""

    @property
    def wrong(self) -> bool:
        return self.prediction is not None and self.prediction != self.label


def expert_colours(count: int) -> tuple[str, ...]:
    """`count` colours as hex; from the ninth on hues by the golden angle at alternating lightness."""
    extra = []
    for i in range(max(0, count - len(_NAMED))):
        rgb = colorsys.hls_to_rgb((0.08 + i * 0.381966) % 1, (0.45, 0.68, 0.56)[i % 3], (0.75, 0.6)[i % 2])
        extra.append("#" + "".join(f"{round(255 * c):02x}" for c in rgb))
    return (_NAMED + tuple(extra))[:count]


def samples(records: Sequence[Line], arm: str, seed: int) -> list[Sample]:
    """The newest samples of one run; images that cannot be read are left out."""
    latest: dict[str, Line] = {str(line["layer"]): line for line in select(records, "samples", arm, seed)}
    found: dict[int, Sample] = {}
    for layer, line in latest.items():
        names = line.get("class_names") or []
        for item in line.get("images") or []:
            if not item.get("experts"):
                continue
            grid = np.asarray(item["experts"], dtype=np.int64)
            known = found.get(item["index"])
            if known is not None:
                known.grids[layer] = grid
            elif (picture := _decoded(item.get("png"))) is not None:
                found[item["index"]] = Sample(
                    picture,
                    _class(item.get("label"), names) or "",
                    _class(item.get("prediction"), names),
                    {layer: grid},
                )
    return list(found.values())


def patch_sheet(shown: Sequence[Sample], num_experts: int, theme: Theme) -> bytes:
    """A PNG: images across, below each of them its patches by expert, one row per layer, and a legend."""
    layers = list(dict.fromkeys(layer for sample in shown for layer in sample.grids))
    num_experts = max([num_experts, *(int(grid.max()) + 1 for sample in shown for grid in sample.grids.values())])
    blocks = [shown[i : i + PER_ROW] for i in range(0, len(shown), PER_ROW)]
    font, small = _font(26), _font(22)
    margin, head = 14, 68
    side = max([int(small.getlength("image")), *(int(small.getlength(shorten(name, 22))) for name in layers)]) + 24
    block_height = head + (1 + len(layers)) * (CELL + GAP) + 16
    per_legend = max(1, (len(blocks[0]) * (CELL + GAP)) // 130)
    legend_rows = -(-(num_experts + 1) // per_legend)
    width = 2 * margin + side + len(blocks[0]) * (CELL + GAP)
    sheet = Image.new("RGB", (width, 2 * margin + len(blocks) * block_height + 42 * legend_rows), theme.surface)
    draw = ImageDraw.Draw(sheet)
    colours = expert_colours(num_experts)
    for number, block in enumerate(blocks):
        top = margin + number * block_height
        for row, name in enumerate(["image", *layers]):
            middle = top + head + row * (CELL + GAP) + CELL // 2
            draw.text((margin, middle), shorten(name, 22), theme.muted, small, anchor="lm")
        for column, sample in enumerate(block):
            left = margin + side + column * (CELL + GAP)
            _caption(draw, sample, left, top, font, small, theme)
            sheet.paste(_fitted(sample.picture, theme), (left, top + head))
            for row, layer in enumerate(layers, start=1):
                if layer in sample.grids:
                    cell = _tinted(sample.picture, sample.grids[layer], colours, theme)
                    sheet.paste(cell, (left, top + head + row * (CELL + GAP)))
    _legend(draw, colours, per_legend, margin + side, margin + len(blocks) * block_height, small, theme)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _decoded(text: str | None) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(base64.b64decode(text or "", validate=True))).convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError):
        return None


def _class(value: object, names: Sequence[str]) -> str | None:
    if value is None:
        return None
    return str(names[value]) if isinstance(value, int) and 0 <= value < len(names) else str(value)


def _fitted(picture: Image.Image, theme: Theme) -> Image.Image:
    """The picture in a CELL x CELL square: whole, centred, its pixels kept crisp when enlarged."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    cell = Image.new("RGB", (CELL, CELL), theme.surface)
    cell.paste(picture.resize(size, resample), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _tinted(picture: Image.Image, grid: NDArray[np.int64], colours: Sequence[str], theme: Theme) -> Image.Image:
    """The picture's light and shade in the experts' colours; dropped patches stay grey and are crossed out."""
    square = picture.resize((CELL, CELL), Image.Resampling.NEAREST if max(picture.size) <= CELL else None)
    light = np.asarray(square.convert("L"), dtype=np.float64)[..., None] / 255  # (CELL, CELL, 1)
    palette = np.asarray([*(ImageColor.getrgb(c) for c in colours), (140, 140, 140)], dtype=np.float64)
    rows = np.arange(CELL) * grid.shape[0] // CELL
    columns = np.arange(CELL) * grid.shape[1] // CELL
    colour = palette[grid[rows][:, columns]]  # -1 takes the last, grey
    cell = Image.fromarray((colour * (0.38 + 0.62 * light)).round().astype(np.uint8))
    draw = ImageDraw.Draw(cell)
    tall, wide = CELL / grid.shape[0], CELL / grid.shape[1]
    for y, x in np.argwhere(grid < 0):
        draw.line((x * wide, y * tall, (x + 1) * wide, (y + 1) * tall), theme.bad, 2)
        draw.line((x * wide, (y + 1) * tall, (x + 1) * wide, y * tall), theme.bad, 2)
    return _in_proportion(cell, picture, theme)


def _in_proportion(cell: Image.Image, picture: Image.Image, theme: Theme) -> Image.Image:
    """A square overlay brought to the picture's own proportions."""
    if picture.width == picture.height:
        return cell
    scale = CELL / max(picture.size)
    return _fitted(cell.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))), theme)


Font = ImageFont.FreeTypeFont


def _font(size: int) -> Font:
    """The face of the other figures; it comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _caption(
    draw: ImageDraw.ImageDraw, sample: Sample, left: int, top: int, font: Font, small: Font, theme: Theme
) -> None:
    draw.text((left, top + 26), _narrow(sample.label, font), theme.ink, font, anchor="ls")
    if sample.wrong:
        draw.text((left, top + 56), _narrow(f"taken for {sample.prediction}", small), theme.bad, small, anchor="ls")
    elif sample.prediction is not None:
        draw.text((left, top + 56), "recognised", theme.muted, small, anchor="ls")


def _narrow(text: str, font: Font) -> str:
    """`text` cut so that it fits above a cell."""
    while font.getlength(text) > CELL and len(text) > 1:
        text = text[:-2] + "…"
    return text


def _legend(
    draw: ImageDraw.ImageDraw, colours: Sequence[str], per_row: int, left: int, top: int, font: Font, theme: Theme
) -> None:
    for i, colour in enumerate([*colours, "#8c8c8c"]):
        x, y = left + i % per_row * 130, top + i // per_row * 42
        draw.rounded_rectangle((x, y, x + 30, y + 30), 6, colour)
        if i == len(colours):
            draw.line((x, y, x + 30, y + 30), theme.bad, 3)
            draw.line((x, y + 30, x + 30, y), theme.bad, 3)
        draw.text((x + 40, y + 15), "dropped" if i == len(colours) else str(i), theme.ink, font, anchor="lm")
