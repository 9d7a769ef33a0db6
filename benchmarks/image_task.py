"""A data set as tensors, and the pretrained model to fine-tune on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset
from transformers import AutoImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import DataTrainingArguments, ModelArguments
from image_classification import model_loader, prepare_data
from pretrained import resolve_model
from transforms import batch_transform, collate, processor_size


@dataclass(frozen=True)
class Task:
    """A data set and a model.

    Attributes:
        train, test: `pixel_values` (N, 3, size, size) float32 and labels (N,) int64.
        load_model: gives the pretrained model with a fresh, random head.
        image_size: side of the images in pixels.
    """

    train: TensorDataset
    test: TensorDataset
    load_model: Callable[[], Any]
    image_size: int


def prepare_task(
    dataset: str,
    model: str,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    cache: str | None = None,
) -> Task:
    """Decodes and resizes all images once.

    Args:
        dataset: a name of `examples/data.py`, an image folder, or a name for `datasets.load_dataset`.
        model: a name of `examples/pretrained.py`, a local folder, or a name on the hub.
        image_size: side in pixels; None: what the model's processor says.
        max_train_samples, max_test_samples: random parts of that size, always the same.
        cache: the examples' cache folder.
    """
    path = resolve_model(model, cache)
    limits = {"max_train_samples": max_train_samples, "max_eval_samples": max_test_samples}
    parts = prepare_data(DataTrainingArguments(dataset=dataset, **limits), cache, seed=0)
    processor = AutoImageProcessor.from_pretrained(path)
    transform = batch_transform(processor, image_size)
    tensors = {}
    for split, part in parts.items():
        batch = collate(list(part.with_transform(transform)))
        tensors[split] = TensorDataset(batch["pixel_values"], batch["labels"])
    classes = parts["train"].features["label"].names
    load_model = model_loader(path, ModelArguments(), classes)
    return Task(tensors["train"], tensors["test"], load_model, image_size or processor_size(processor))
