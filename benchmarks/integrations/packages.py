"""The integrations that need another package: quantised weights and ONNX. Each is imported by its case alone."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from benchmarks.integrations.cases import Case, or_the_base
from benchmarks.integrations.setting import Refused, Setting, gradients, relative_error, scores
from benchmarks.quantized import quantize_linear


def _inside(setting: Setting) -> Callable[[nn.Module, str], bool]:
    """Which layers are quantised: linear layers outside the head."""
    heads = setting.architecture.head

    def is_linear(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and not any(name == head or name.startswith(f"{head}.") for head in heads)

    return is_linear


def _quantized(quantize: Callable[[nn.Module, Callable[[nn.Module, str], bool]], None]) -> Case:
    """Gradients on top of quantised weights, saving, loading, and merging where there are biases."""

    def case(setting: Setting) -> None:
        is_linear = _inside(setting)
        if not any(is_linear(module, name) for name, module in setting.base.named_modules()):
            raise Refused("it has no linear layer outside its head")

        def base() -> nn.Module:
            made = copy.deepcopy(setting.base)
            quantize(made, is_linear)
            return made

        def step_of_base(_: nn.Module) -> None:
            plain = base().train()
            for parameter in plain.parameters():
                parameter.requires_grad_(type(parameter) is nn.Parameter and parameter.is_floating_point())
            plain(**setting.batch).loss.backward()
            scores(plain.eval(), setting.batch)

        with or_the_base(step_of_base, setting, "cannot be trained on these weights"):
            exact = gradients(setting.trained(base(), activation_bits=None), setting.batch)
            coded = gradients(setting.trained(base(), activation_bits=8), setting.batch)
            model = setting.trained(base())
            expected = scores(model, setting.batch)
        assert relative_error(coded, exact) < 0.05, relative_error(coded, exact)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(base(), folder).eval()
        torch.testing.assert_close(scores(loaded, setting.batch), expected, rtol=1e-3, atol=1e-3)

    return case


def _torchao(**settings: Any) -> Case:
    def quantize(model: nn.Module, is_linear: Callable[[nn.Module, str], bool]) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        bits = settings["bits"]
        config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(16))
        quantize_(model, config, filter_fn=is_linear)

    return _quantized(quantize)


def _bitsandbytes(four_bits: bool) -> Case:
    return _quantized(partial(quantize_linear, four_bits=four_bits))


def onnx(setting: Setting) -> None:
    """`torch.onnx.export`, run by onnxruntime: the scores of the adapted model."""
    import onnxruntime

    batch = {key: value for key, value in setting.batch.items() if key not in ("labels", "return_loss")}

    class Scores(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            output = self.model(**dict(zip(batch, values, strict=True)))
            found: torch.Tensor = output.logits_per_image if "logits_per_image" in output else output.logits
            return found

    def export(model: Any) -> bytes:
        program = torch.onnx.export(
            Scores(model).eval(), tuple(batch.values()), input_names=list(batch), dynamo=True, verbose=False
        )
        file = io.BytesIO()
        assert program is not None
        program.save(file)
        return file.getvalue()

    model = setting.trained()
    with or_the_base(export, setting, "cannot be exported"):
        exported = export(model)
    session = onnxruntime.InferenceSession(exported)
    wanted = {entry.name for entry in session.get_inputs()}
    (found,) = session.run(None, {key: value.numpy() for key, value in batch.items() if key in wanted})
    torch.testing.assert_close(torch.from_numpy(found), scores(model, batch), rtol=1e-3, atol=1e-4)


CASES: dict[str, tuple[str, Case]] = {
    "torchao, int8 weights": ("torchao", _torchao(bits=8)),
    "torchao, int4 weights": ("torchao", _torchao(bits=4)),
    "bitsandbytes, 8 bits": ("bitsandbytes", _bitsandbytes(four_bits=False)),
    "bitsandbytes, NF4": ("bitsandbytes", _bitsandbytes(four_bits=True)),
    "ONNX": ("onnxruntime", onnx),
}
"""For each case the package that it needs."""
