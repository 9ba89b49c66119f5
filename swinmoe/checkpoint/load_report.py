"""What became of every tensor when weights were loaded into a model: nothing is dropped or invented in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from swinmoe.errors import CheckpointError


@dataclass(frozen=True)
class LoadReport:
    """Names as in files (`swinmoe.checkpoint.naming`). Every tensor of model and source is in exactly one list."""

    source: str
    """What was loaded, for messages."""
    loaded: tuple[str, ...] = ()
    """Taken as they are."""
    resized: Mapping[str, str] = field(default_factory=dict)
    """Taken and changed: name -> how, such as `bias table 13x13 -> 23x23, bicubic` or `float64 -> float32`."""
    reinitialised: Mapping[str, str] = field(default_factory=dict)
    """Of the model, left at their initial values on purpose: name -> why."""
    unused: tuple[str, ...] = ()
    """Of the source, with no place in the model."""
    missing: tuple[str, ...] = ()
    """Of the model, not in the source."""

    def check(self, allow: Sequence[str] = ()) -> LoadReport:
        """This report, if nothing is unused or missing but what a pattern of `allow` names (`head.*`, `*.fc2.bias`).

        Raises:
            CheckpointError: names what is left over, and the patterns that would allow it.
        """
        problems = []
        for what, names in (("lacks", self.missing), ("has, and the model has no place for,", self.unused)):
            open_names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allow)]
            if open_names:
                listed = ", ".join(open_names[:8]) + (f" and {len(open_names) - 8} more" if len(open_names) > 8 else "")
                problems.append(f"{self.source} {what} {listed}")
        if problems:
            raise CheckpointError(
                "; ".join(problems) + "; convert or choose the source that fits this model, or allow these by name "
                f"(--allow PATTERN, or in a config finetune.allow; now allowed: {list(allow) or 'none'})"
            )
        return self

    def summary(self) -> str:
        """One line a list, for people."""
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for what, names in (
            ("resized or cast", [f"{name} ({how})" for name, how in self.resized.items()]),
            ("initialised anew", [f"{name} ({why})" for name, why in self.reinitialised.items()]),
            ("unused", list(self.unused)),
            ("missing", list(self.missing)),
        ):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                parts.append(f"  {len(names)} {what}: {', '.join(names[:6])}{more}")
        return "\n".join(parts)
