"""Record the logits of dense models of other libraries, with the names and shapes of their weights.

Run by hand where they are installed; this project's tests read the recordings only:

    python tests/data/record_dense.py microsoft CHECKOUT     # a copy of github.com/microsoft/Swin-Transformer
    python tests/data/record_dense.py huggingface            # needs transformers

Weights and images are drawn by tests/numerics/import_weights.py. Tables that follow from the configuration are stored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "numerics"))

from import_weights import DERIVED, draw, images  # noqa: E402

SIZE = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}


def microsoft(checkout: str) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    sys.path.insert(0, checkout)
    from models.simmim import SimMIM, SwinTransformerForSimMIM, SwinTransformerV2ForSimMIM
    from models.swin_transformer import SwinTransformer
    from models.swin_transformer_v2 import SwinTransformerV2
    from yacs.config import CfgNode

    def simmim(encoder: nn.Module) -> nn.Module:
        return SimMIM(CfgNode({"NORM_TARGET": {"ENABLE": False, "PATCH_SIZE": 3}}), encoder, 8, 3, 4)

    usual = {**SIZE, "num_classes": 7}
    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, kind, choice in (
        ("v1", SwinTransformer, {"img_size": 64, "window_size": 4}),
        ("v1_shrunk", SwinTransformer, {"img_size": 32, "window_size": 8, "ape": True}),
        ("v2", SwinTransformerV2, {"img_size": 64, "window_size": 4}),
        ("v2_4to8", SwinTransformerV2, {"img_size": 64, "window_size": 8, "pretrained_window_sizes": [4, 4]}),
    ):
        cases[name] = (kind(**usual, **choice), {**usual, **choice})
    for name, kind in (("simmim_v1", SwinTransformerForSimMIM), ("simmim_v2", SwinTransformerV2ForSimMIM)):
        choice = {**SIZE, "num_classes": 0, "img_size": 64, "window_size": 4}
        cases[name] = (simmim(kind(**choice)), choice)
    return cases


def huggingface() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    from transformers import (
        SwinConfig,
        SwinForImageClassification,
        SwinModel,
        Swinv2Config,
        Swinv2ForImageClassification,
        Swinv2Model,
    )

    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, head, bare, config, choice in (
        ("v1", SwinForImageClassification, SwinModel, SwinConfig, {"image_size": 64, "window_size": 4}),
        ("v2", Swinv2ForImageClassification, Swinv2Model, Swinv2Config, {"image_size": 64, "window_size": 4}),
        (
            "v2_4to8",
            Swinv2ForImageClassification,
            Swinv2Model,
            Swinv2Config,
            {"image_size": 64, "window_size": 8, "pretrained_window_sizes": [4, 4]},
        ),
    ):
        values = {**SIZE, **choice}
        cases[name] = (head(config(**values, num_labels=7)), {**values, "num_classes": 7})
        cases[f"{name}_bare"] = (bare(config(**values)), {**values, "num_classes": 0})
    return cases


@torch.no_grad()
def output(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits, or the pooled features of a model without a head."""
    if name.startswith("simmim"):
        maps = model.encoder(x, torch.zeros(len(x), 16, 16))
        return maps.mean((2, 3))
    out = model(x)
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output


def main() -> None:
    family = sys.argv[1]
    cases = microsoft(sys.argv[2]) if family == "microsoft" else huggingface()
    tensors, facts = {}, {}
    for seed, (name, (model, choice)) in enumerate(cases.items()):
        if family == "huggingface":  # names in its files are what counts, and not those in memory
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                file = Path(folder) / "model.safetensors"
                shapes = {key: list(value.shape) for key, value in load_file(file).items()}
                drawn = {key: draw(key, tuple(shape), seed) for key, shape in shapes.items()}
                save_file(drawn, file, metadata={"format": "pt"})
                model = type(model).from_pretrained(folder).eval()
        else:
            model.eval()
            shapes = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(draw(key, tuple(parameter.shape), seed))
        side = choice.get("img_size", choice.get("image_size"))
        tensors[f"{name}/logits"] = output(name, model, images(2, side, seed))
        stored = {key: value for key, value in model.state_dict().items() if key.endswith(DERIVED)}
        assert len(model.state_dict()) == len(shapes) + len(stored), name
        tensors |= {f"{name}/{key}": value.clone() for key, value in stored.items()}
        facts[name] = {"config": choice, "seed": seed, "shapes": shapes}
        print(name, tensors[f"{name}/logits"].abs().max(), len(shapes), len(stored))
    path = HERE / f"swin_{family}.safetensors"
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})
    path.chmod(0o644)


if __name__ == "__main__":
    main()
