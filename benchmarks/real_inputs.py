"""Models with trained weights, and real images for them.

- `dinov2-small-saliency`: DINOv2-small, pretrained, saliency-tuned (see `examples/pretrained.py`)
- `efficientnet-lite0`: EfficientNet-Lite0, pretrained on ImageNet-1k
- `dinov2-small-registers`: the first one with four more tokens, copies of the class token with two of the 384 channels
  at 100 times the mean magnitude, as register tokens of large models have them ("massive activations"); not trained
- `swin-trained`: a small Swin (64 channels, depths 2, 2, 6, 2, windows of 7 x 7) after three epochs on clip-art
- `swin-random`: the same before training
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    get_linear_schedule_with_warmup,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import DataTrainingArguments
from cache import build_once, cache_dir
from image_classification import prepare_data, quiet, to_batch
from pretrained import BACKBONES, resolve_model

DINOV2 = "dinov2-small-saliency"
REGISTERS = 4
MASSIVE_CHANNELS = (0, 1)
MASSIVE = 100.0
SWIN_EPOCHS = 3


@dataclass(frozen=True)
class RealInput:
    """A model and a batch for it.

    Attributes:
        load: gives the model with a fresh head, the same at every call.
        batch: `pixel_values` and `labels`.
        special_tokens: class and register tokens, which come first.
    """

    load: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    special_tokens: int


def real_input(
    name: str, images: int = 8, image_size: int = 224, dataset: str = "clip-art", seed: int = 0
) -> RealInput:
    """The model called `name` (see the module's list) and `images` images of `dataset`, which ones is up to `seed`.

    Raises:
        KeyError: for an unknown name.
    """
    parts = prepare_data(DataTrainingArguments(dataset=dataset, max_train_samples=images), None, seed)
    classes = len(parts["train"].features["label"].names)
    path = resolve_model(name if name in BACKBONES else DINOV2)
    batch = to_batch(parts["train"], AutoImageProcessor.from_pretrained(path), image_size)
    loaders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "dinov2-small-saliency": (lambda: _pretrained(path, classes), 1),
        "efficientnet-lite0": (lambda: _pretrained(path, classes), 0),
        "dinov2-small-registers": (lambda: with_registers(path, classes), 1 + REGISTERS),
        "swin-trained": (lambda: trained_swin(dataset, classes, image_size), 0),
        "swin-random": (lambda: small_swin(classes, image_size), 0),
    }
    load, special = loaders[name]

    def seeded() -> nn.Module:
        with quiet():
            set_seed(0)
            return load()

    return RealInput(seeded, batch, special)


def _pretrained(path: str, classes: int) -> nn.Module:
    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        path, num_labels=classes, ignore_mismatched_sizes=True
    )
    return model


def with_registers(path: str, classes: int) -> Any:
    """DINOv2-small with registers that stand out as those of large models do."""
    plain: Any = _pretrained(path, classes)
    shared = {
        name: value for name, value in plain.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    model: Any = Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**shared | {"num_register_tokens": REGISTERS})
    )
    old, new = plain.base_model_prefix, model.base_model_prefix
    state = {name.replace(f"{old}.", f"{new}.", 1): value for name, value in plain.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("register_tokens") for name in missing), missing
    embeddings = model.dinov2_with_registers.embeddings
    with torch.no_grad():
        tokens = embeddings.cls_token.expand(1, REGISTERS, -1).clone()
        tokens += 0.02 * torch.randn(tokens.shape)
        tokens[..., list(MASSIVE_CHANNELS)] = MASSIVE * embeddings.cls_token.abs().mean()
        embeddings.register_tokens.copy_(tokens)
    return model


def small_swin(classes: int, image_size: int) -> Any:
    """A Swin with random weights, heads of 32 channels."""
    config = SwinConfig(
        image_size=image_size,
        embed_dim=64,
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 8, 16],
        window_size=7,
        drop_path_rate=0.0,
        num_labels=classes,
    )
    return SwinForImageClassification(config)


def trained_swin(dataset: str, classes: int, image_size: int) -> Any:
    """`small_swin` after `SWIN_EPOCHS` on `dataset`; trained once (minutes) and cached."""

    def train(folder: Path) -> None:
        print(f"training a small Swin on {dataset} (once)", flush=True)
        set_seed(0)
        model = small_swin(classes, image_size).train()
        parts = prepare_data(DataTrainingArguments(dataset=dataset), None, seed=0)
        batch = to_batch(parts["train"], AutoImageProcessor.from_pretrained(resolve_model(DINOV2)), image_size)
        pairs = list(zip(batch["pixel_values"], batch["labels"], strict=True))
        loader: Any = DataLoader(pairs, batch_size=16, shuffle=True)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
        schedule = get_linear_schedule_with_warmup(optimizer, len(loader), SWIN_EPOCHS * len(loader))
        for _ in range(SWIN_EPOCHS):
            for pixels, labels in loader:
                loss = model(pixel_values=pixels, labels=labels).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            print(f"loss {loss.item():.3f}", flush=True)
        model.save_pretrained(folder)

    folder = build_once(cache_dir() / "models" / f"small-swin-{dataset}-{image_size}-{SWIN_EPOCHS}", train)
    return SwinForImageClassification.from_pretrained(folder)
