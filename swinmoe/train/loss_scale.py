"""Dynamic loss scaling for float16, decided by the global gradient norm so that all ranks always agree.

`torch.amp.GradScaler` looks for infinities in the gradients of its own rank; with experts spread over ranks one rank
can see what the others do not, skip alone and drift. The clipped norm is already global, so it decides here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Scale of the loss: halves when gradients overflow, doubles after `growth_interval` good steps."""

    value: float = 1.0
    dynamic: bool = False
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Account for one optimiser step, taken or skipped."""
        if not self.dynamic:
            return
        if overflowed:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
        else:
            self.good_steps += 1
            if self.good_steps >= self.growth_interval:
                self.value, self.good_steps = self.value * 2, 0


def make_loss_scale(precision: str) -> LossScale:
    """Dynamic from 2^16 for `fp16`; constant 1 otherwise."""
    return LossScale(value=2.0**16, dynamic=True) if precision == "fp16" else LossScale()
