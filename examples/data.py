"""Image classification data sets as a `datasets.DatasetDict` with splits `train`, `test` and columns `image`, `label`.

| name                      | what                                         | from                           |
|---------------------------|----------------------------------------------|--------------------------------|
| `digits`                  | 1,797 grey 8x8 digits, 70/30 split           | inside scikit-learn            |
| `fashion-mnist`           | 60,000 + 10,000 grey 28x28 images            | Debian `dataset-fashion-mnist` |
| `clip-art`                | drawings in ten classes, random 70/30 split  | two Debian packages            |
| `openclipart-to-tuxpaint` | trained on one collection, tested on another | two Debian packages            |
| a folder                  | one folder per class, or train/ and test/    | your disk                      |
| anything else             | `datasets.load_dataset(name)`                | the hub, or `datasets`' cache  |
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from clip_art import prepare_clip_art
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
TEST_SHARE = 0.3
SPLIT_SEED = 0


def load_images(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """Load data set `name` (see the table above); `cache` is the examples' cache folder.

    `config_name`, `image_column` and `label_column` serve data sets of the hub; columns are found by their type when
    not named. The split that is tested on is `test`, else `validation`, else a random 30 % of `train`.
    Raises `FileNotFoundError` when a Debian package is missing, `ValueError` when the columns cannot be found.
    """
    if name in _NAMED:
        return _NAMED[name](cache)
    if Path(name).is_dir():
        loaded = load_dataset("imagefolder", data_dir=str(Path(name).resolve()))
    else:
        loaded = load_dataset(name, config_name)
    return _with_test_split(
        DatasetDict({key: _standard(part, image_column, label_column) for key, part in loaded.items()})
    )


def load_digits(cache: str | os.PathLike[str] | None = None) -> DatasetDict:
    """scikit-learn's 8x8 digits; nothing is downloaded."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return _with_test_split(DatasetDict(train=_from_arrays(pixels, digits.target, [str(n) for n in range(10)])))


def load_fashion_mnist(cache: str | os.PathLike[str] | None = None, folder: Path = FASHION_MNIST) -> DatasetDict:
    """Fashion-MNIST from the idx files in `folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found: run `apt-get install dataset-fashion-mnist` (31 MB)")
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        parts[split] = _from_arrays(images, read_idx(folder / f"{stem}-labels-idx1-ubyte.gz"), FASHION_CLASSES)
    return DatasetDict(parts)


def load_clip_art(cache: str | os.PathLike[str] | None = None) -> DatasetDict:
    """All drawings of both collections, split at random."""
    folder = prepare_clip_art(cache)
    return _with_test_split(
        DatasetDict(train=_from_folders(*(folder / source for source in ("openclipart", "tuxpaint"))))
    )


def load_openclipart_to_tuxpaint(cache: str | os.PathLike[str] | None = None) -> DatasetDict:
    """Train on openclipart, test on tuxpaint: a domain shift."""
    folder = prepare_clip_art(cache)
    return DatasetDict(train=_from_folders(folder / "openclipart"), test=_from_folders(folder / "tuxpaint"))


_NAMED: dict[str, Callable[..., DatasetDict]] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "clip-art": load_clip_art,
    "openclipart-to-tuxpaint": load_openclipart_to_tuxpaint,
}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes (two zero bytes, type 8, rank, big-endian sizes, values)."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def _features(classes: list[str]) -> Features:
    return Features({"image": ImageFeature(), "label": ClassLabel(names=classes)})


def _from_arrays(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Dataset:
    columns = {"image": [Image.fromarray(image) for image in images], "label": [int(label) for label in labels]}
    return Dataset.from_dict(columns, features=_features(classes))


def _from_folders(*roots: Path) -> Dataset:
    classes = sorted({folder.name for root in roots for folder in root.iterdir()})
    paths = [path for root in roots for path in sorted(root.rglob("*.png"))]
    columns = {"image": [str(path) for path in paths], "label": [classes.index(path.parent.name) for path in paths]}
    return Dataset.from_dict(columns, features=_features(classes))


def _standard(part: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Keep the image and the label column only, under the names `image` and `label`."""
    found = {"image": image_column, "label": label_column}
    for wanted, kind in (("image", ImageFeature), ("label", ClassLabel)):
        candidates = [column for column, feature in part.features.items() if isinstance(feature, kind)]
        if found[wanted] is None and len(candidates) == 1:
            found[wanted] = candidates[0]
        if found[wanted] not in part.features:
            raise ValueError(f"no single {wanted} column among {list(part.features)}: pass --{wanted}_column_name")
    part = part.select_columns(list(found.values())).rename_columns(
        {old: new for new, old in found.items() if old != new}
    )
    return part if isinstance(part.features["label"], ClassLabel) else part.class_encode_column("label")


def _with_test_split(parts: DatasetDict) -> DatasetDict:
    if "test" in parts and "train" in parts:
        return DatasetDict(train=parts["train"], test=parts["test"])
    if "train" in parts and "validation" in parts:
        return DatasetDict(train=parts["train"], test=parts["validation"])
    only = parts["train"] if "train" in parts else next(iter(parts.values()))
    return only.train_test_split(test_size=TEST_SHARE, seed=SPLIT_SEED)
