"""What fine-tuning adds to a run: where weights come from, how they meet the model, and what stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swinmoe.config.checks import at_least, below_one, check_ranges
from swinmoe.errors import ConfigError

FreezePolicy = Literal["none", "router", "experts", "moe", "backbone"]


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How experts start from a dense checkpoint's MLPs; see `swinmoe.checkpoint.upcycle.Upcycling`."""

    noise: float = 0.0
    """Standard deviation of noise on every expert's matrices, over that of the matrix itself."""
    drop: float = 0.0
    """Share of each expert's hidden units drawn anew (drop-upcycling)."""
    shuffle: bool = False
    """Experts narrower than the MLP: cut its hidden units in a random order."""
    preserve: bool = True
    """Refuse expert layers that cannot compute the dense function at step 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "finetune.upcycle", noise=at_least(0, "use 0 for none"), drop=below_one())


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """`swinmoe finetune`. Resolution, window, drop path, expert dropout and capacity are the model's own keys."""

    source: str = ""
    """A checkpoint, a saved model, or anything that can be converted; `--from` sets it."""
    weights: Literal["auto", "model", "average"] = "auto"
    """Of a checkpoint: the weights, or their moving average; `auto` = the average where there is one."""
    head: Literal["new", "keep"] = "new"
    """`new`: a freshly drawn classifier; `keep`: the source's, by `class_map` if there are other classes."""
    class_map: str | None = None
    """With `head: keep`, a file with a line for each class: its number among the source's classes."""
    freeze: FreezePolicy = "none"
    """What keeps the source's values: nothing; routers; experts (shared ones too); both, `moe`; all but the head."""
    balance: bool | None = None
    """Balance losses; null = only where routers are trained. With a frozen router they act on the features alone."""
    upcycle: UpcycleConfig | None = None
    """Needed where the source is dense and the model is sparse: how its MLPs become experts."""
    allow: tuple[str, ...] = ()
    """Patterns (`layers.3.*`) of tensors that may be missing, left over or of another shape."""

    def __post_init__(self) -> None:
        if self.class_map is not None and self.head != "keep":
            raise ConfigError(
                f"finetune.class_map={self.class_map!r} picks classes of the source's head, and finetune.head=new has "
                "none of them; set finetune.head=keep, or class_map=null"
            )

    @property
    def trains_routers(self) -> bool:
        """False where the freeze policy holds the routers still."""
        return self.freeze in ("none", "experts")
