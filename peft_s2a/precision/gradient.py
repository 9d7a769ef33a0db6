"""Gradients of a few images, one by one, and how far they move when something else is kept for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..memory.running import Batch, measured_training, tensors_in

Loss = Callable[[nn.Module, Any], Tensor]
"""Loss of a model on a batch."""


@dataclass(frozen=True)
class Arguments:
    """What a model is called with, and the labels where they are not among it."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    labels: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Arguments:
        """Those of a batch: a mapping, a tensor, a pair of images and class numbers, or positional arguments."""
        if isinstance(batch, Tensor):
            return cls((batch,))
        if isinstance(batch, Mapping):
            return cls((), batch)
        if len(batch) == 2 and all(isinstance(t, Tensor) for t in batch) and not batch[1].is_floating_point():
            return cls((batch[0],), None, batch[1])
        return cls(tuple(batch))


def single_items(batch: Any, most: int) -> Iterator[Any]:
    """Batches of one item each, of the first `most`.

    Tensors as long as the first one are split, and so are lists of one entry for each item (targets of a detector);
    others are shared.
    """
    tensors = [t for t in tensors_in(batch) if t.dim()]
    count = len(tensors[0]) if tensors else 0

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and len(value) == count and value is not batch

    for index in range(min(count, most)):

        def item(value: Any, index: int = index) -> Any:
            by_item = is_list(value) or (isinstance(value, Tensor) and value.dim() and len(value) == count)
            return value[index : index + 1] if by_item else value

        yield tree_map(item, dict(batch) if isinstance(batch, Mapping) else batch, is_leaf=is_list)


def first_items(batches: Iterable[Any], images: int, seed: int) -> list[Any]:
    """The first images of a loader, as batches of one; torch's random state is left as it was.

    Raises:
        ValueError: if there is none.
    """
    found: list[Any] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            found.extend(single_items(batch, images - len(found)))
            if len(found) >= images:
                break
    if not found:
        raise ValueError(
            "The dataloader gave no image to calibrate with: give one with at least one batch, of tensors whose first "
            "dimension is the batch."
        )
    return found


def default_loss(model: nn.Module, call: Arguments, seed: int) -> Tensor:
    """The loss in the model's output, or cross-entropy with labels beside it, or the output along random numbers.

    Raises:
        ValueError: if no output needs a gradient.
    """
    output = model(*call.args, **(call.kwargs or {}))
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError("No output of the model needs a gradient: is the adapter trainable?")
    if call.labels is not None:
        return F.cross_entropy(tensors[0].float(), call.labels)
    generator = torch.Generator().manual_seed(seed)
    terms = [(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).mean() for t in tensors]
    return torch.stack(terms).sum()


class GradientProbe:
    """The gradient of `parameters` on single images, with the same random numbers at every call.

    Args:
        model: it is called in the mode that it is in; `quiet_training` leaves it as it was.
        items: arguments of the model, one image each: memory is needed for one.
        loss: `loss(model, batch)`; None: `default_loss`.
        seed: image i is run with seed + i.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], items: Sequence[Any], loss: Loss | None, seed: int
    ) -> None:
        self.model, self.parameters, self.items, self.loss, self.seed = model, parameters, items, loss, seed

    def forward(self, index: int) -> Tensor:
        """The loss on an image."""
        torch.manual_seed(self.seed + index)
        item = self.items[index]
        if self.loss is not None:
            return self.loss(self.model, item)
        call = item if isinstance(item, Arguments) else Arguments.of(item)
        return default_loss(self.model, call, self.seed + index)

    def __call__(self, index: int) -> Tensor:
        """The gradient on an image as one vector, float32.

        Raises:
            ValueError: for a loss that is not finite, and for a batch norm that needs more than one image.
        """
        try:
            loss = self.forward(index)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "The model has a batch norm on maps of one pixel, which needs more than one image, and calibration "
                "takes one at a time. Calibrate with that layer in eval mode (model.train(), layer.eval(), "
                "peft_s2a.calibrate(model, batches)), or set activation_bits to a number."
            ) from error
        if not bool(torch.isfinite(loss.detach()).all()):
            raise ValueError(
                f"The loss on calibration image {index} is {float(loss.detach().float().sum())}: the gradient says "
                "nothing about precision then. Look for NaN or infinities in its pixels and labels, or calibrate on "
                "other images."
            )
        found = torch.autograd.grad(loss, list(self.parameters), allow_unused=True)
        parts = zip(found, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in parts])


class ErrorProbe:
    """How far gradients are from those at the time when this is made.

    Args:
        gradient: gives the gradients that are compared; those of now, which are exact, are kept.
    """

    def __init__(self, gradient: GradientProbe) -> None:
        self.gradient = gradient
        self.exact = [gradient(index) for index in range(len(gradient.items))]
        self.norms = [float(exact.norm()) for exact in self.exact]
        if not any(self.norms):
            raise ValueError(
                "The adapter's gradient is zero on the calibration images: calibrate with a loss and labels."
            )

    def __call__(self) -> float:
        """Root mean square of the images' relative errors; those without a gradient do not count."""
        squares = [
            (float((self.gradient(index) - exact).norm()) / norm) ** 2
            for index, (exact, norm) in enumerate(zip(self.exact, self.norms, strict=True))
            if norm
        ]
        return math.sqrt(sum(squares) / len(squares))


@contextmanager
def quiet_training(model: nn.Module) -> Iterator[None]:
    """Inside, the model trains; outside, nothing has changed: no buffer, gradient, mode of a module, random number.

    A model that trains already keeps the mode of each part.
    """
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    with measured_training(model, ()):
        if was_training:
            for module, mode in modes:
                module.training = mode
        yield
