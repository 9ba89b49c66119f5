"""Images in, batches out: data sets, transforms, and loaders whose every draw is reproducible."""

from swinmoe.data.batch import Batch
from swinmoe.data.build import DataBundle, build_data
from swinmoe.data.dataset import ImageDataset
from swinmoe.data.loader import TrainStream, eval_batches

__all__ = ["Batch", "DataBundle", "ImageDataset", "TrainStream", "build_data", "eval_batches"]
