"""Class folders as torchvision's ImageFolder reads them, which is how people keep ImageNet:
`root/train/CLASS/image.jpeg` and `root/val/CLASS/image.jpeg` (or `root/test/...`)."""

from __future__ import annotations

from pathlib import Path

from swinmoe.data.source import FileSource, RawData
from swinmoe.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LAYOUT = "ROOT/train/CLASS/*.jpeg and ROOT/val/CLASS/*.jpeg (or ROOT/test/CLASS/*.jpeg)"


def load_folder(root: str | None) -> RawData:
    """RGB images below `root`; classes are the sorted folder names under `train`.

    Raises:
        DataError: no root, no `train` folder, an empty class, or evaluation classes that differ from training's.
    """
    if root is None:
        raise DataError(f"data.name=folder needs data.root=ROOT, a folder laid out as {_LAYOUT}")
    base = Path(root)
    if not (base / "train").is_dir():
        state = "does not exist" if not base.is_dir() else "has no folder 'train'"
        raise DataError(f"data.root={root} {state}; it must be laid out as {_LAYOUT}")
    train, names = _scan(base / "train")
    split = next((split for split in ("val", "test") if (base / split).is_dir()), None)
    evaluation = None
    if split is not None:
        evaluation, eval_names = _scan(base / split)
        if eval_names != names:
            only = sorted(set(names) ^ set(eval_names))
            raise DataError(
                f"{base / 'train'} and {base / split} do not hold the same classes; {len(only)} are in one of them "
                f"only: {', '.join(only[:8])}{' ...' if len(only) > 8 else ''}"
            )
    return RawData(
        train=train,
        eval=evaluation,
        eval_split=split or "val",
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _scan(folder: Path) -> tuple[FileSource, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a set of class folders with images ({error}); needed: {_LAYOUT}") from error
    return FileSource.of([path for path, _ in found.samples], found.targets), tuple(found.classes)
