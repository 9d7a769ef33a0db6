"""From PIL images to `pixel_values`, with the size and the normalisation that a checkpoint's processor asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision import transforms as tv


def processor_size(processor: Any) -> int:
    """Side of the square images the checkpoint was made for, in pixels."""
    if data_config := getattr(processor, "data_config", None):  # timm
        return int(data_config["input_size"][-1])
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size: dict[str, int] = dict(crop or processor.size)
    return size.get("height") or size["shortest_edge"]


def processor_normalisation(processor: Any) -> Any:
    """The checkpoint's normalisation of images in 0..1."""
    if data_config := getattr(processor, "data_config", None):
        return tv.Normalize(data_config["mean"], data_config["std"])
    if getattr(processor, "image_mean", None) is None:
        return tv.Lambda(lambda pixels: pixels)
    return tv.Normalize(processor.image_mean, processor.image_std)


def batch_transform(processor: Any, size: int | None, augment: bool = False) -> Callable[..., Any]:
    """A transform for `Dataset.with_transform`: adds `pixel_values` (3, size, size) to a batch of `image`, `label`.

    `size` None takes the processor's. `augment` crops and flips at random, which suits photographs but not digits.
    """
    side = processor_size(processor) if size is None else size
    bicubic = tv.InterpolationMode.BICUBIC
    if augment:
        steps: list[Any] = [tv.RandomResizedCrop(side, interpolation=bicubic), tv.RandomHorizontalFlip()]
    else:
        steps = [tv.Resize(side, interpolation=bicubic), tv.CenterCrop(side)]
    steps += [tv.ToTensor(), processor_normalisation(processor)]
    to_pixels = tv.Compose(steps)

    def apply(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "pixel_values": [to_pixels(image.convert("RGB")) for image in batch["image"]],
            "labels": batch["label"],
        }

    return apply


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack transformed examples into a batch for the model."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
