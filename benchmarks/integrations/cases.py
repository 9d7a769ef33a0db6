"""The integrations that need nothing beside the library: each case raises where it does not work."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.integrations.setting import (
    Refused,
    Setting,
    disturb,
    gradients,
    is_bias_only,
    relative_error,
    scores,
    trainable,
)
from peft_s2a.structure import is_batch_norm

Case = Callable[[Setting], None]


def train(setting: Setting) -> None:
    """Bias deltas: the identity at the start, and gradients near the exact ones."""
    _train(setting, bias_only=True)


def train_blocks(setting: Setting) -> None:
    """Prompts and side branches, the same."""
    _train(setting, bias_only=False)


def _train(setting: Setting, bias_only: bool) -> None:
    fields = {} if bias_only or not is_bias_only(setting) else {"prompt_rank": 8, "side_reduction": 16}
    fresh = setting.adapt(bias_only=bias_only, **fields).eval()
    names = {re.findall(r"s2a_([a-z]+)", name)[0] for name in trainable(fresh) if "s2a_" in name}
    assert names == ({"bias"} if bias_only else {"bias", "prompt", "side"}), names
    torch.testing.assert_close(scores(fresh, setting.batch), scores(setting.base, setting.batch), rtol=1e-4, atol=1e-5)
    exact, coded = (
        gradients(setting.trained(bias_only=bias_only, activation_bits=bits), setting.batch) for bits in (None, 8)
    )
    assert relative_error(coded, exact) < 0.05, relative_error(coded, exact)


def save_and_load(setting: Setting) -> None:
    """`save_pretrained`, and `from_pretrained` into a fresh base model."""
    model = setting.trained()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(setting.base), folder).eval()
    torch.testing.assert_close(scores(loaded, setting.batch), scores(model, setting.batch))


def half(dtype: torch.dtype) -> Case:
    """Weights of the base model in a half precision; the adapter stays in float32."""

    def case(setting: Setting) -> None:
        low = setting.to(dtype)
        model = low.trained()
        assert {p.dtype for name, p in trainable(model).items() if "s2a_" in name} == {torch.float32}
        with or_the_base(lambda base: base(**low.batch).loss, low, "has no loss in it on this device"):
            gradients(model, low.batch)
        save_and_load(low)

    return case


def transformers_methods(setting: Setting) -> None:
    """`add_adapter`, `save_pretrained` and `load_adapter` of a model of transformers."""
    model: Any = copy.deepcopy(setting.base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*neither trained nor saved")
        model.add_adapter(setting.config(), "mine")
    disturb(model, "mine").eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: Any = copy.deepcopy(setting.base)
        if type(again).load_adapter is not PreTrainedModel.load_adapter:
            raise Refused("the model class has a load_adapter of its own, for something else")
        again.load_adapter(folder, "again")
    torch.testing.assert_close(scores(again.eval(), setting.batch), scores(model, setting.batch))


def gradient_checkpointing(setting: Setting) -> None:
    """The gradients are those without checkpoints."""
    if not getattr(setting.base, "supports_gradient_checkpointing", False):
        raise Refused("the model class has no gradient checkpointing")
    model = setting.trained()
    expected = gradients(model, setting.batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, setting.batch), expected, rtol=1e-4, atol=1e-6)


def merge(setting: Setting) -> None:
    """Bias deltas become biases, and no module of the library is left."""
    unmergeable = [
        name
        for name, module in setting.base.named_modules()
        if "norm" in type(module).__name__.lower()
        and not is_batch_norm(module)
        and getattr(module, "bias", None) is None
        and not isinstance(module, nn.Identity)
    ]
    model = setting.trained(bias_only=True, exclude_modules=unmergeable or None)
    expected = scores(model, setting.batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merging gives")
        merged = model.merge_and_unload()
    assert not any(type(module).__module__.startswith("peft_s2a") for module in merged.modules())
    torch.testing.assert_close(scores(merged, setting.batch), expected, rtol=1e-4, atol=1e-5)


def mixed_batch(setting: Setting) -> None:
    """`adapter_names`: one item with the adapter, the other with the base model."""
    model = setting.trained()
    batch = {key: value for key, value in setting.batch.items() if key not in ("labels", "return_loss")}
    expected = scores(model, batch)
    with model.disable_adapter():
        plain = scores(model, batch)
    mixed = scores(model, batch, adapter_names=["default", "__base__"])
    if (len(mixed) == 2 and "input_ids" not in batch) or "pixel_values" not in batch:
        torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-5)
    else:  # scores of images against texts: those of an item with itself
        torch.testing.assert_close(mixed.diag(), torch.stack([expected[0, 0], plain[1, 1]]), rtol=1e-4, atol=1e-5)


def trainer(setting: Setting) -> None:
    """Stock `Trainer`: a run that resumes from its checkpoint ends bit for bit where the whole run ends."""

    def run(folder: str, **resume: Any) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
        )
        torch.manual_seed(0)
        model = setting.adapt()
        worker = Trainer(model=model, args=arguments, train_dataset=[0, 1], data_collator=lambda _: dict(setting.batch))
        worker.train(**resume)
        return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}

    with tempfile.TemporaryDirectory() as folder:
        whole = run(folder)
        resumed = run(folder, resume_from_checkpoint=f"{folder}/checkpoint-1")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@contextmanager
def or_the_base(works_for: Callable[[nn.Module], Any], setting: Setting, what: str) -> Iterator[None]:
    """Where something fails that fails for the model without an adapter, too, it is refused for that reason."""
    try:
        yield
    except Exception:
        try:
            works_for(copy.deepcopy(setting.base))
        except Exception as error:
            raise Refused(f"the base model alone {what} ({type(error).__name__})") from error
        raise


def compiled(setting: Setting) -> None:
    """`torch.compile(fullgraph=True)`, training: the gradients of the eager model."""

    def compile_and_step(model: Any) -> torch.Tensor:
        torch._dynamo.reset()
        return gradients(torch.compile(model, backend="aot_eager", fullgraph=True), setting.batch)

    expected = gradients(setting.trained(activation_bits=8), setting.batch)
    with or_the_base(compile_and_step, setting, "does not compile in one graph"):
        found = compile_and_step(setting.trained(activation_bits=8))
    assert relative_error(found, expected) < 0.02, relative_error(found, expected)


def exported(setting: Setting) -> None:
    """`torch.export`: the scores of the adapted model."""
    batch = {key: value for key, value in setting.batch.items() if key not in ("labels", "return_loss")}

    def export(model: Any) -> Any:
        return torch.export.export(model.eval(), (), batch, strict=False)

    model = setting.trained()
    with or_the_base(export, setting, "cannot be exported"):
        program = export(model)
    torch.testing.assert_close(scores(program.module(), batch), scores(model, batch), rtol=1e-4, atol=1e-5)


CASES: dict[str, Case] = {
    "bias deltas": train,
    "prompts and side branches": train_blocks,
    "save and load": save_and_load,
    "bf16 weights": half(torch.bfloat16),
    "fp16 weights": half(torch.float16),
    "`add_adapter` of transformers": transformers_methods,
    "gradient checkpointing": gradient_checkpointing,
    "merging bias deltas": merge,
    "`adapter_names` in a batch": mixed_batch,
    "`Trainer`, resumed": trainer,
    "`torch.compile`, one graph": compiled,
    "`torch.export`": exported,
}
"""Every case that needs no other package."""
