"""Run as a script, with `HF_ENDPOINT` set before anything is imported: pushes, then loads by name, revision, subfolder.

A `Trainer` with `push_to_hub` pushes, too.

Usage: hub_client.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers as T
from huggingface_hub import HfApi, constants
from peft import AutoPeftModel, PeftModel, get_peft_model

from peft_s2a import MemoryReportCallback, S2AConfig, push_to_hub

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_base() -> T.ViTForImageClassification:
    torch.manual_seed(0)
    return T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)).eval()


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES).logits


def make_adapter(seed: int) -> PeftModel:
    base = make_base()
    base.name_or_path = base.config._name_or_path = "user/base"
    model = get_peft_model(base, S2AConfig(modules_to_save=["classifier"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "s2a_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def load_all(first: torch.Tensor, second: torch.Tensor, sha: str, subfolder: str | None) -> None:
    loads = {
        "by name": (PeftModel.from_pretrained(make_base(), "user/flowers"), second),
        "by commit": (PeftModel.from_pretrained(make_base(), "user/flowers", revision=sha), first),
        "with its base": (AutoPeftModel.from_pretrained("user/flowers"), None),
    }
    if subfolder:
        loads["by subfolder"] = PeftModel.from_pretrained(make_base(), "user/flowers", subfolder=subfolder), first
    for how, (model, expected) in loads.items():
        if expected is not None:
            torch.testing.assert_close(scores(model), expected, msg=lambda text, how=how: f"{how}: {text}")
    model = make_base()
    model.load_adapter("user/flowers")
    torch.testing.assert_close(scores(model), second)


def push_by_trainer(folder: Path) -> None:
    """Every checkpoint and the end are pushed; then the same repository once more, with what was measured."""
    arguments = T.TrainingArguments(
        output_dir=str(folder / "trained"),
        push_to_hub=True,
        hub_model_id="user/trained",
        max_steps=2,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
    )
    samples = [{"pixel_values": image, "labels": index} for index, image in enumerate(IMAGES)]
    model, callbacks = make_adapter(3), [MemoryReportCallback()]
    trainer = T.Trainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples, callbacks=callbacks)
    trainer.remove_callback(T.PrinterCallback)
    trainer.train()
    trainer.push_to_hub()
    loaded = PeftModel.from_pretrained(make_base(), "user/trained")
    torch.testing.assert_close(scores(loaded), scores(model))
    metrics = trainer.evaluate() | {"eval_accuracy": 0.75}
    commit = push_to_hub(model, "user/trained", metrics=metrics, log_history=trainer.state.log_history)
    loaded = PeftModel.from_pretrained(make_base(), "user/trained", revision=commit.oid)
    torch.testing.assert_close(scores(loaded), scores(model))


def main(folder: Path) -> None:
    make_base().push_to_hub("user/base")
    first, second = make_adapter(1), make_adapter(2)
    sha = first.push_to_hub("user/flowers").oid
    second.push_to_hub("user/flowers")
    first.save_pretrained(folder / "one")
    HfApi().upload_folder(repo_id="user/flowers", folder_path=folder / "one", path_in_repo="small/one")
    load_all(scores(first), scores(second), sha, "small/one")
    push_to_hub(first, "user/carded", revision="branch")
    push_by_trainer(folder)
    print("loaded", flush=True)
    input()  # until the server is gone
    constants.HF_HUB_OFFLINE = True
    load_all(scores(first), scores(second), sha, None)  # PEFT 0.21 looks for subfolder/subfolder when offline
    print("loaded from the cache")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
