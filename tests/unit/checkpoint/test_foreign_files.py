"""Files of others that are damaged, mixed up or up to no good: refused by name, none run, none taken for another."""

from __future__ import annotations

import pickle
import random
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinmoe.checkpoint.convert import model_of
from swinmoe.checkpoint.export import write_export
from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.pretrained import save_pretrained
from swinmoe.checkpoint.source import read_source
from swinmoe.checkpoint.unpickle import read_pickle
from swinmoe.config import ModelConfig
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.build import preset_config


def dense(seed: int = 0) -> SwinTransformer:
    size = {"img_size": (16, 16), "window_size": (2, 2), "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
    return build_model(ModelConfig(**size, num_classes=5), seed=seed)


def sparse(seed: int = 0) -> SwinTransformer:
    return build_model(preset_config("swin_moe_micro", embed_dim=8, moe={"num_experts": 4}), seed=seed)


def state(seed: int = 0) -> Mapping[str, Tensor]:
    return dense(seed).state_dict()


class Malice:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_function_asked_for_is_named_whatever_the_protocol(protocol: int, tmp_path: Path) -> None:
    """Protocol 4 names functions by texts on the stack, which may come from the memo."""
    path = tmp_path / "bad.pth"
    tree = {"model": {"exec": torch.zeros(1).tolist(), "builtins": 1, "x": Malice()}}
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    with pytest.raises(
        CheckpointError, match=r"bad\.pth' asks for '(__builtin__|builtins)\.exec' to be loaded"
    ) as found:
        read_source(path)
    assert "only if you" not in str(found.value)  # torch's own advice
    torch.save({"model": {"x": Malice()}}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"exec' to be loaded"):
        read_source(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "git lfs pull"),
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(range(200)), "no file of weights that torch wrote"),
    ],
)
def test_what_is_no_file_of_torchs(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as found:
        read_source(tmp_path / "x.pth")
    assert "x.pth" in str(found.value) and "weights_only" not in str(found.value)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the data, of which torch.load checks nothing; and the part that it is in is named."""
    weights = state()
    torch.save({"model": weights}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[data.find(weights["head.weight"].numpy().tobytes()) + 3] ^= 0x40
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pth' is damaged: its part 'x/data/\d+'"):
        read_source(tmp_path / "x.pth")


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_source(tmp_path / "x.pth").named["head.weight"], state()["head.weight"])


def test_damage_of_any_kind_ends_in_a_sentence_with_the_files_name(tmp_path: Path) -> None:
    """Old and new files of torch's, and a zip of one: bits and bytes changed and cut off, most of them in headers."""
    weights = {"norm.weight": torch.zeros(3), "patch_embed.proj.weight": torch.zeros(2, 3, 2, 2)}
    torch.save(weights, tmp_path / "new.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "zip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "new.pth", "new.pth")
    draw, refused = random.Random(0), 0
    for kind in ("new.pth", "old.pth", "zip.zip"):
        sound = (tmp_path / kind).read_bytes()
        path = tmp_path / f"bad{kind}"
        for _ in range(60):
            data = bytearray(sound)
            at = draw.choice((draw.randrange(len(data)), draw.randrange(200), len(data) - 1 - draw.randrange(300)))
            how = draw.randrange(3)
            if how == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                data[at] = draw.randrange(256)
            path.write_bytes(data[:at] if how == 2 else data)
            try:
                read_source(path)
            except CheckpointError as error:
                assert path.name in str(error) or "no layout known here" in str(error)
                assert "weights_only" not in str(error) or "asks for" in str(error)
                refused += 1
    assert refused > 100


def test_ranks_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        torch.save({"model": state(seed)}, tmp_path / f"{name}.pth.rank0")
    both = [tmp_path / "a.pth.rank0", tmp_path / "b.pth.rank0"]
    with pytest.raises(CheckpointError, match=r"not of one checkpoint: there are ranks of \['a\.pth', 'b\.pth'\]"):
        read_source(both)
    with pytest.raises(CheckpointError, match=r"no rank of 'a\.pth', \['b\.pth'\]"):
        read_source([both[0], both[1].rename(tmp_path / "b.pth")])
    shutil.copy(both[0], tmp_path / "a.pth.rank00")
    with pytest.raises(CheckpointError, match="of the same rank"):
        read_source(tmp_path / "a.pth")
    (tmp_path / "a.pth.rank00").unlink()
    (tmp_path / "a.pth.rank0.sha256").write_text("x")  # neither rank nor weights
    assert torch.equal(read_source(tmp_path / "a.pth").named["head.weight"], state(1)["head.weight"])


def test_archives_notes_are_passed_over_and_names_are_unique(tmp_path: Path) -> None:
    torch.save({"model": state(1)}, tmp_path / "a.pth")
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.pth", "x/a.pth.rank0")
        for note in ("__MACOSX/._a.pth.rank0", "x/._a.pth.rank0", "README.txt", "x/.DS_Store"):
            archive.writestr(note, b"note")
    assert torch.equal(read_source(path).named["head.weight"], state(1)["head.weight"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/a.pth.rank0", b"other")
    with pytest.raises(CheckpointError, match=r"holds both 'x/a\.pth\.rank0' and 'y/a\.pth\.rank0'"):
        read_source(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.pth", "a.pth.rank0")
        archive.writestr("a.pth.rank1", b"<html>")
    with pytest.raises(CheckpointError, match=r"x\.zip', 'a\.pth\.rank1' is damaged.*web page"):
        read_source(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", b"")
    with pytest.raises(CheckpointError, match="holds no file of weights"):
        read_source(path)


def test_names_that_patterns_would_misread(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    torch.save({"model": state(1)}, folder / "m[0].pth.rank0")
    for path in (folder, folder / "m[0].pth", folder / "m[0].pth.rank0"):
        assert torch.equal(read_source(path).named["head.weight"], state(1)["head.weight"])


def test_a_folder_counts_by_what_it_holds_itself(tmp_path: Path) -> None:
    torch.save({"model": state(1)}, tmp_path / "a.pth")
    save_pretrained(dense(2), tmp_path / "older" / "model")
    assert torch.equal(read_source(tmp_path).named["head.weight"], state(1)["head.weight"])


@pytest.mark.parametrize("to", ["tutel", "tutel-master"])
def test_a_rank_copied_over_another_is_noticed(to: str, tmp_path: Path) -> None:
    write_export(sparse(1), tmp_path, to, num_ranks=4)
    shutil.copy(tmp_path / "model.pth.rank0", tmp_path / "model.pth.rank2")
    with pytest.raises(CheckpointError, match=r"ranks 0 and 2 hold the same experts.*'ranks-equal'"):
        read_source(tmp_path)
    assert read_source(tmp_path, ["ranks-equal"]).layout == "swin-moe"
    upcycled = sparse(1)
    with torch.no_grad():
        for layer in upcycled.moe_layers().values():
            for tensor in layer.experts.parameters():
                tensor.copy_(tensor[:1].expand_as(tensor))
    write_export(upcycled, tmp_path / "copies", to, num_ranks=2)
    model = sparse(3)
    load_pretrained(model, tmp_path / "copies", allow=["ranks-equal"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), upcycled.parameters(), strict=True))


def test_shared_files_are_closed_after_reading(tmp_path: Path) -> None:
    """Opened from the start each time: an archive's member is looked at more than once."""
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "x.pth")
    with (tmp_path / "x.pth").open("rb") as opened:
        opened.seek(5)
        assert torch.equal(read_pickle(opened, "x")["a.weight"], torch.ones(2))
        assert not opened.closed


def test_a_whole_module_is_refused_with_what_makes_weights_of_it(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"asks for 'torch\.nn\.modules.*weights_only=False\)\.state_dict\(\)"):
        read_source(tmp_path / "whole.pth")


def test_another_architecture_is_said_to_be_one(tmp_path: Path) -> None:
    vit = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit\.pth.*no Swin Transformer.*blocks\.0\.attn.*sparsify"):
        model_of(read_source(tmp_path / "vit.pth"))


def test_a_head_of_other_classes_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    torch.save(dict(state()), tmp_path / "x.pth")
    other = build_model(replace(dense().config, num_classes=7))
    with pytest.raises(CheckpointError, match=r"--allow 'head\.\*'.*--class-map FILE"):
        load_pretrained(other, tmp_path / "x.pth")
