"""Handwritten digits: 1797 grey images of 8x8 pixels that come inside scikit-learn, so nothing is downloaded.

Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI machine learning repository, 1998.
"""

from __future__ import annotations

import numpy as np
import torch

from swinmoe.data.source import ArraySource, RawData

_TEST_IMAGES = 360
"""The last fifth. The file is ordered by writer, so most test digits are by hands unseen in training; a random split
would mix writers and flatter every model. The classes are balanced (33 to 37 images each)."""


def load_digits() -> RawData:
    """1437 training and 360 test images, values 0..16 spread over 0..255."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    targets = torch.from_numpy(found.target).long()
    return RawData(
        train=ArraySource(images[:-_TEST_IMAGES], targets[:-_TEST_IMAGES]),
        eval=ArraySource(images[-_TEST_IMAGES:], targets[-_TEST_IMAGES:]),
        eval_split="test",
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.3054,),
        std=(0.3755,),
    )
