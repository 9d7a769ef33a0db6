"""Which layout of the scales suits q, k and v: error of the adapter's gradient with nothing but attention coded.

    python -m benchmarks.attention_layouts                                       # every model, at 4, 3 and 2 bits
    python -m benchmarks.attention_layouts --models swin-random --bits 4

The forward pass is exact; backward recomputes attention from q, k and v as a layout of `benchmarks/layouts.py` gives
them back. The relative error is the norm of the gradient's difference over the norm of the exact gradient, all adapter
parameters together, on real images. One JSON line a result goes to `results/attention_layouts.jsonl`, after two checks:
the identity layout gives torch's gradient, and the default layout the gradient that the library gives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.layouts import DEFAULT, Layout, layouts
from benchmarks.real_inputs import RealInput, real_input
from benchmarks.results import append, read, versions
from peft_s2a import S2AConfig
from peft_s2a.settings import OPERATOR_KINDS
from peft_s2a.table import TABLE, Context

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from methods import head_names

MODELS = ("dinov2-small-saliency", "dinov2-small-registers", "swin-trained", "swin-random")


class CodedAttention(torch.autograd.Function):
    """Torch's attention forward; backward through what the layout makes of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any, coder: Any) -> Tensor:
        ctx.save_for_backward(*coder(q, k, v))
        ctx.mask, ctx.options = mask, options
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            output = F.scaled_dot_product_attention(*inputs, attn_mask=ctx.mask, **ctx.options)
        return *torch.autograd.grad(output, inputs, grad), None, None, None


class Coder:
    """Applies a layout to q, k and v, and counts elements and bits."""

    def __init__(self, layout: Layout, bits: int) -> None:
        self.layout, self.bits = layout, bits
        self.elements = self.kept_bits = 0.0

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        decoded = []
        for coder, tensor in zip(self.layout, tensors, strict=True):
            values, bits = coder(tensor.contiguous(), self.bits)
            decoded.append(values)
            self.elements += tensor.numel()
            self.kept_bits += bits * tensor.numel()
        return decoded

    def handler(self, context: Context, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Any:
        """Stands in for the library's handler of attention."""
        return CodedAttention.apply(q, k, v, attn_mask, options, self)


def adapted(source: RealInput, bits: int | dict[str, int | None] | None) -> nn.Module:
    """The model with a fresh adapter; the same one at every call."""
    base: Any = source.load()
    torch.manual_seed(0)
    config = S2AConfig(
        modules_to_save=head_names(base), activation_bits=bits, image_size=source.batch["pixel_values"].shape[-1]
    )
    return get_peft_model(base, config).train()


def gradient(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The gradient of every adapter parameter, in one vector."""
    model.zero_grad()
    model(**batch).loss.backward()
    grads = [p.grad.flatten() for name, p in model.named_parameters() if "s2a_" in name and p.grad is not None]
    return torch.cat(grads)


def measure(name: str, options: argparse.Namespace) -> None:
    """All layouts of one model."""
    images, image_size = options.images, options.image_size
    source = real_input(name, images, image_size, options.dataset, options.seed)
    exact_model = adapted(source, None)
    exact = gradient(exact_model, source.batch)
    names = ("model", "layout", "bits", "images", "image_size", "seed")
    done = {tuple(record[name] for name in names) for record in read("attention_layouts")}

    def coded(layout: Layout, bits: int) -> tuple[float, float]:
        coder = Coder(layout, bits)
        with patch.dict(TABLE, {F.scaled_dot_product_attention: coder.handler}):
            found = gradient(exact_model, source.batch)
        assert coder.elements, "no attention ran"
        return ((found - exact).norm() / exact.norm()).item(), coder.kept_bits / coder.elements

    known = layouts(source.special_tokens, images, windows=name.startswith("swin"))
    unchanged = coded(known.pop("identity"), 8)[0]
    assert unchanged < 1e-5, f"identity is {unchanged} off"
    library = gradient(adapted(source, dict.fromkeys(OPERATOR_KINDS) | {"attention": 4}), source.batch)
    expected, found = ((library - exact).norm() / exact.norm()).item(), coded(known[DEFAULT], 4)[0]
    assert abs(found - expected) < 0.02 * expected, f"the default layout is {found} off here, {expected} in the library"
    for bits in options.bits:
        for title, layout in known.items():
            if options.layouts and title not in options.layouts:
                continue
            if not options.fresh and (name, title, bits, images, image_size, options.seed) in done:
                continue
            error, kept = coded(layout, bits)
            record = {
                "model": name,
                "layout": title,
                "bits": bits,
                "images": images,
                "image_size": image_size,
                "seed": options.seed,
                "error": round(error, 5),
                "kept_bits": round(kept, 4),
                "versions": versions(),
            }
            append("attention_layouts", record)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0, help="which images; the table shows the mean")
    parser.add_argument("--layouts", nargs="+", help="titles, such as 'channel, Hadamard'; default: all")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the results")
    options = parser.parse_args()
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
