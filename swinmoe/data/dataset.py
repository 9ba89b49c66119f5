"""Images with labels and their transforms: one by one, or many at once where they are held in memory.

N images, b images of a batch, C channels (1 or 3), H height, W width
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from swinmoe.config import AugmentConfig
from swinmoe.data.source import ArraySource, ImageSource
from swinmoe.data.tar_shards import TarSource
from swinmoe.data.transforms import Augment, Normalise, Size, pixels, resize, resize_and_crop, to_channels


class ImageDataset:
    """A split of a data set: raw pictures, plain views of them, and augmented ones by (seed, epoch, index).

    Args:
        source: the pictures of this split.
        size: (H, W) of what the model sees.
        mean, std: per channel; their length is C.
        augment: training's augmentations; None = every view is plain.
        seed: of the augmentations.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: Size,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.targets: Tensor = source.targets
        """(N,) int64."""
        self._source = source
        self._size = size
        self._channels = len(mean)
        self._normalise = Normalise(mean, std)
        self._augment = None
        if augment is not None:
            self._augment = Augment(augment, size=size, mean=mean, normalise=self._normalise, seed=seed)
        self._memory = self._preload(source.images) if isinstance(source, ArraySource) else None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shards(self) -> npt.NDArray[np.int32] | None:
        """(N,) number of the shard each image is in; None where they are not in shards."""
        return self._source.shard if isinstance(self._source, TarSource) else None

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8: the picture the plain view shows, before normalisation, as RGB whatever C is."""
        return np.array(self._fit(self._open(index)).convert("RGB"))

    def sample(self, epoch: int | None, index: int) -> tuple[Tensor, int]:
        """(C, H, W) float32 and the class id; augmented if this split has augmentations and an epoch is given."""
        picture, target = self._open(index), int(self.targets[index])
        if self._augment is None or epoch is None:
            return self._normalise(pixels(self._fit(picture))), target
        return self._augment.sample(picture, self._fit, epoch, index), target

    def batch(self, epoch: int | None, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(b, C, H, W) float32 and (b,) int64: bit for bit what `sample` gives for each index; b = 0 is legal."""
        positions = torch.tensor(indices, dtype=torch.int64)
        targets = self.targets[positions]
        plain = self._augment is None or epoch is None
        if self._memory is not None and plain:
            return self._normalise(self._memory[positions]), targets
        if self._memory is not None and self._augment is not None and self._augment.vectorised and epoch is not None:
            return self._augment.batch(self._memory[positions], epoch, positions.numpy()), targets
        images = torch.empty(len(indices), self._channels, *self._size)
        for row, index in enumerate(indices):
            images[row], _ = self.sample(epoch, index)
        return images, targets

    def _open(self, index: int) -> Image.Image:
        """The whole picture in the mode that C means."""
        return to_channels(self._source.open(index), self._channels)

    def _fit(self, picture: Image.Image) -> Image.Image:
        """The plain view: photographs are scaled and cropped, small ready-made images only scaled."""
        if isinstance(self._source, ArraySource):
            return resize(picture, self._size)
        return resize_and_crop(picture, self._size)

    def _preload(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """(N, C, H, W) uint8: all plain views, made once. Grey shown as RGB takes one channel of memory."""
        grey = images.ndim == 3
        own = 1 if grey else self._channels
        if grey and images.shape[1:] == self._size:
            return torch.from_numpy(images.copy())[:, None].expand(-1, self._channels, -1, -1)
        store = torch.empty(len(self), own, *self._size, dtype=torch.uint8)
        for index in range(len(self)):
            store[index] = pixels(self._fit(to_channels(self._source.open(index), own)))
        return store.expand(-1, self._channels, -1, -1)
