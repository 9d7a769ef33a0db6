"""Fine-tune an image classifier with S2A in a loop of your own, on any number of devices, with `accelerate`.

    python examples/image_classification_no_trainer.py --dataset digits --image_size 56
    accelerate launch --num_processes 2 --cpu examples/image_classification_no_trainer.py --dataset digits
    accelerate launch --config_file my_fsdp_or_deepspeed.yaml examples/image_classification_no_trainer.py

One process saves the adapter to `--output_dir`; `--checkpoint_every` keeps the whole state of the training, and
`--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from data import load_images
from peft import get_peft_model
from pretrained import resolve_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transforms import batch_transform, collate

from peft_s2a import S2AConfig


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="dinov2-small-saliency", help="hub, folder or a known name")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image_size", type=int, help="default: what the model's processor says")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/no-trainer"))
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], help="default: that of accelerate's config"
    )
    parser.add_argument("--checkpoint_every", type=int, default=0, help="optimizer steps; 0: never")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and save; returns what is written to `results.json`."""
    args = parse_arguments(arguments)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the order follows from seed and epoch
    )
    set_seed(args.seed)
    with accelerator.main_process_first():
        parts = load_images(args.dataset)
        path = resolve_model(args.model_name_or_path, None)
    classes = parts["train"].features["label"].names
    train = parts["train"].shuffle(seed=args.seed)
    train = train.select(range(min(args.max_train_samples or len(train), len(train))))
    test = parts["test"].select(range(min(args.max_eval_samples or len(parts["test"]), len(parts["test"]))))
    processor = AutoImageProcessor.from_pretrained(path)
    to_pixels = batch_transform(processor, args.image_size)
    loaders = [
        DataLoader(
            part.with_transform(to_pixels),
            batch_size=args.per_device_train_batch_size,
            shuffle=part is train,
            collate_fn=collate,
        )
        for part in (train, test)
    ]

    base = AutoModelForImageClassification.from_pretrained(path, num_labels=len(classes), ignore_mismatched_sizes=True)
    model: Any = get_peft_model(base, S2AConfig(modules_to_save=["classifier"], image_size=args.image_size))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)

    step, start = 0, 0
    if args.resume:
        accelerator.load_state(args.resume)
        step = json.loads((args.resume / "step.json").read_text())["step"]
        start = step * args.gradient_accumulation_steps
    for epoch in range(start // len(train_loader), args.num_train_epochs):
        model.train()
        done = start % len(train_loader) if epoch == start // len(train_loader) else 0
        train_loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(train_loader, done):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if accelerator.sync_gradients and args.checkpoint_every and step % args.checkpoint_every == 0:
                folder = args.output_dir / f"checkpoint-{step}"
                accelerator.save_state(folder)
                if accelerator.is_main_process:
                    (folder / "step.json").write_text(json.dumps({"step": step}))

    model.eval()
    right, total = 0, 0
    for batch in test_loader:
        with torch.no_grad():
            guesses = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        guesses, labels = accelerator.gather_for_metrics((guesses, batch["labels"]))
        right, total = right + int((guesses == labels).sum()), total + len(labels)

    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        args.output_dir / "adapter",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    results = {"accuracy": right / total, "steps": step, "processes": accelerator.num_processes}
    if accelerator.is_main_process:
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{results['accuracy']:.2%} after {step} steps in {results['processes']} processes")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
