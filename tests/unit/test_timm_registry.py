"""timm's users get swinmoe's models by timm's means."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from swinmoe.config.presets import PRESETS
from swinmoe.errors import ConfigError
from swinmoe.models import create_model
from swinmoe.timm_registry import TimmSwin, register_with_timm


@pytest.mark.parametrize("first", ["import swinmoe, timm", "import timm, swinmoe"])
def test_presets_are_in_the_registry_whichever_is_imported_first(first: str) -> None:
    code = f"{first}; import sys; sys.exit(not timm.is_model('swinmoe_swin_v2_t_256_w8'))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=120).returncode == 0


def test_every_preset_is_registered_once() -> None:
    names = register_with_timm()
    assert names == register_with_timm()  # warnings are errors here, and timm warns of a second registration
    assert len(names) == len(PRESETS)
    assert set(names) <= set(timm.list_models("swinmoe_*"))


def test_create_model_takes_timms_arguments_and_returns_logits() -> None:
    register_with_timm()
    model = timm.create_model("swinmoe_swin_micro", num_classes=7, img_size=48, in_chans=1, drop_path_rate=0.2)
    assert isinstance(model, TimmSwin)
    images = torch.randn(2, 1, 48, 48)
    model.eval()
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.equal(logits, model.forward_head(model.forward_features(images)))
    assert (model.config.drop_path_rate, model.img_size, model.in_chans) == (0.2, (48, 48), 1)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_weights_and_names_are_those_of_swinmoe() -> None:
    register_with_timm()
    ours, theirs = create_model("swin_moe_micro", seed=4), timm.create_model("swinmoe_swin_moe_micro", seed=4)
    images = torch.randn(2, 3, 32, 32)
    theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    assert torch.equal(theirs(images), ours(images).logits)
    assert torch.equal(theirs.forward_output(images).aux_loss, ours(images).aux_loss)


def test_timm_finds_data_settings_and_layer_groups() -> None:
    from timm.optim import param_groups_layer_decay

    register_with_timm()
    model = timm.create_model("swinmoe_swin_micro")
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 6  # stem, four blocks, head


def test_pretrained_weights_are_refused() -> None:
    register_with_timm()
    with pytest.raises(ConfigError, match="pretrained=False"):
        timm.create_model("swinmoe_swin_micro", pretrained=True)
