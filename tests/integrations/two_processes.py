"""Run in two processes: distributed training against the same training in one process.

Usage: two_processes.py FOLDER, where the main process saves the adapter.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys

import torch
import transformers as T
from accelerate import Accelerator
from accelerate.utils import gather
from peft import PeftModel, get_peft_model

from peft_s2a import S2AConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}


def make_models() -> dict[str, torch.nn.Module]:
    clip = T.CLIPConfig(vision_config=T.CLIPVisionConfig(**VISION).to_dict(), num_labels=3)
    resnet = T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    return {
        "vit": T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3)),
        "clip": T.CLIPForImageClassification(clip),  # leaves a norm of its backbone unused
        "swin": T.SwinForImageClassification(T.SwinConfig(**SWIN, drop_path_rate=0.0, num_labels=3)),
        "resnet": T.ResNetForImageClassification(resnet),
    }


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, accelerator: Accelerator | None) -> None:
    """Three steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()


def adapter(model: PeftModel, gradient: bool) -> dict[str, torch.Tensor]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.grad if gradient else p.detach() for name, p in trainable.items()}


def check_calibration(images: torch.Tensor, labels: torch.Tensor, accelerator: Accelerator) -> None:
    """Each process has images of its own, and all have the bits of the first; an error in one is one in all."""
    config = S2AConfig(modules_to_save=["classifier"], activation_bits="auto", activation_groups="instance")
    model = get_peft_model(make_models()["vit"], config).train()
    prepared = accelerator.prepare(model)
    message = ""
    try:
        prepared(images / (accelerator.process_index == 0))  # the loss of the second process is not finite
    except ValueError as error:
        message = str(error)
    assert ("another process" if accelerator.is_main_process else "calibration image 0") in message, message
    train(prepared, images, labels, accelerator)
    text = json.dumps(model.peft_config["default"].activation_allocation).encode()
    digest = torch.tensor(list(hashlib.sha256(text).digest()))
    first, second = gather(digest.unsqueeze(0))
    assert model.peft_config["default"].activation_allocation
    assert torch.equal(first, second), text


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.state
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3
    mine = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
    for bits in (None, 4):
        torch.manual_seed(0)
        for name, base in make_models().items():
            model = get_peft_model(base, S2AConfig(modules_to_save=["classifier"], activation_bits=bits)).train()
            alone = copy.deepcopy(model)
            train(alone, images, labels, None)
            train(accelerator.prepare(model), images[mine], labels[mine], accelerator)
            for gradient in (True, False):
                for key, value in adapter(model, gradient).items():
                    message = f"{name} at {bits} bits, {key}, gradient: {gradient}"
                    expected = adapter(alone, gradient)[key]
                    torch.testing.assert_close(
                        value, expected, rtol=1e-3, atol=1e-5, msg=lambda m, t=message: f"{t}: {m}"
                    )
                    first, second = gather(value.unsqueeze(0))
                    assert torch.equal(first, second), message
            if name == "vit" and accelerator.is_main_process:
                accelerator.unwrap_model(model).save_pretrained(folder)
    check_calibration(images[mine], labels[mine], accelerator)
    if accelerator.is_main_process:
        print("equal")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
