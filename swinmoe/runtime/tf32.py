"""TensorFloat-32: a switch of the whole process, for float32 matrix products and convolutions on a GPU."""

from __future__ import annotations

import torch


def use_tf32(enable: bool) -> None:
    """Round operands of float32 products to TensorFloat-32 from now on, or leave them as they are.

    Said either way: torch's own default rounds in convolutions and not in products. CPUs and other types do not notice.
    """
    torch.set_float32_matmul_precision("high" if enable and torch.cuda.is_available() else "highest")
    torch.backends.cudnn.allow_tf32 = enable
