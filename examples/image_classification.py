"""Fine-tune an image classifier with S2A (or LoRA, full fine-tuning, a linear probe) and the stock `Trainer`.

    python examples/image_classification.py --dataset digits --image_size 56 --output_dir outputs/digits
    python examples/image_classification.py --model_name_or_path facebook/dinov2-base --dataset beans

It evaluates before and after training, saves the adapter, checks that a fresh base model with the saved adapter gives
the same scores, and measures what a training step costs beside LoRA and full fine-tuning. Everything is written to
`--output_dir`: `adapter/`, `results.json`, `cost.json`, `cost.png`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import DataTrainingArguments, ExampleTrainingArguments, MethodArguments, ModelArguments
from cost_table import measure_costs, print_costs, write_costs
from data import load_images
from datasets import Dataset, DatasetDict
from methods import LEARNING_RATES, TITLES, apply_method
from metrics import compute_metrics
from peft import PeftModel
from pretrained import BACKBONES, resolve_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.utils import logging as transformers_logging
from transforms import batch_transform, collate
from wheels import DownloadError

Parsed = tuple[ModelArguments, DataTrainingArguments, MethodArguments, ExampleTrainingArguments]


def parse_arguments(arguments: Sequence[str] | None = None) -> Parsed:
    """Read the command line, or a JSON file when that is the only argument, as Hugging Face's scripts do."""
    groups: Any = (ModelArguments, DataTrainingArguments, MethodArguments, ExampleTrainingArguments)
    parser = HfArgumentParser(groups)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) == 1 and given[0].endswith(".json"):
        parsed: Any = parser.parse_json_file(json_file=str(Path(given[0]).resolve()))
    else:
        parsed = parser.parse_args_into_dataclasses(args=given)
    model, data, method, training = parsed
    if training.learning_rate is None:
        training.learning_rate = LEARNING_RATES[method.method]
    return model, data, method, training


def prepare_data(options: DataTrainingArguments, cache: str | None, seed: int) -> DatasetDict:
    """The data set, shortened as asked for."""
    parts = load_images(
        options.dataset,
        cache,
        config_name=options.dataset_config_name,
        image_column=options.image_column_name,
        label_column=options.label_column_name,
    )
    for split, limit in (("train", options.max_train_samples), ("test", options.max_eval_samples)):
        if limit is not None and limit < len(parts[split]):
            parts[split] = parts[split].shuffle(seed=seed).select(range(limit))
    return parts


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and without warnings."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def model_loader(path: str, options: ModelArguments, classes: list[str]) -> Callable[[], PreTrainedModel]:
    """A function that loads the base model with a fresh head for `classes`."""

    loaded_before = False

    def load() -> PreTrainedModel:
        nonlocal loaded_before
        with quiet() if loaded_before else nullcontext():  # say once which weights the checkpoint lacks
            model = load_one()
        loaded_before = True
        return model

    def load_one() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(
            path,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
            revision=options.model_revision,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,
        )
        return model

    return load


def to_batch(images: Dataset, processor: BaseImageProcessor, size: int | None) -> dict[str, torch.Tensor]:
    """All of `images` as one batch for the model."""
    return collate(list(images.with_transform(batch_transform(processor, size))))


def reload_difference(model: Any, load: Callable[[], PreTrainedModel], folder: Path, batch: dict[str, Any]) -> float:
    """Largest difference of the scores between `model` and what was saved in `folder`, loaded into a fresh base."""
    if isinstance(model, PeftModel):
        again: Any = PeftModel.from_pretrained(load(), folder)
    else:
        again = type(model).from_pretrained(folder)
    pixels = batch["pixel_values"].to(model.device)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
        found = again.eval().to(model.device)(pixel_values=pixels).logits
    return float((expected - found).abs().max())


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example and return what it writes to `results.json`."""
    model_args, data_args, method_args, training_args = parse_arguments(arguments)
    options = method_args.options(data_args.image_size)
    set_seed(training_args.seed)

    path = resolve_model(model_args.model_name_or_path, model_args.cache_dir)
    parts = prepare_data(data_args, model_args.cache_dir, training_args.seed)
    processor = AutoImageProcessor.from_pretrained(
        model_args.image_processor_name or path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
    )
    train = parts["train"].with_transform(batch_transform(processor, data_args.image_size, data_args.augment))
    test = parts["test"].with_transform(batch_transform(processor, data_args.image_size))
    load = model_loader(path, model_args, parts["train"].features["label"].names)

    model = apply_method(load(), method_args.method, options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = trainer.evaluate()

    output = Path(training_args.output_dir or ".")
    adapter = output / "adapter"
    model.save_pretrained(adapter)
    some = parts["test"].select(range(min(method_args.cost_batch_size, len(test))))
    difference = reload_difference(model, load, adapter, to_batch(some, processor, data_args.image_size))

    name = model_args.model_name_or_path
    results: dict[str, Any] = {
        "model": BACKBONES[name].title if name in BACKBONES else name,
        "dataset": data_args.dataset,
        "train_images": len(train),
        "test_images": len(test),
        "method": method_args.method,
        "activation_bits": options.activation_bits if method_args.method == "s2a" else None,
        "learning_rate": training_args.learning_rate,
        "epochs": training_args.num_train_epochs,
        "seed": training_args.seed,
        "trained_parameters": trained,
        "total_parameters": total,
        "accuracy_before": before["eval_accuracy"],
        "accuracy_after": after["eval_accuracy"],
        "train_seconds": outcome.metrics["train_runtime"],
        "saved_bytes": folder_bytes(adapter),
        "reload_difference": difference,
    }
    if method_args.cost_table:
        size = method_args.cost_image_size or data_args.image_size
        rows = measure_costs(load, to_batch(some, processor, size), replace(options, image_size=size))
        results["cost"] = rows
        write_costs(rows, output)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results, output)
    return results


def report(results: dict[str, Any], output: Path) -> None:
    """Print the results."""
    share = results["trained_parameters"] / results["total_parameters"]
    same = (
        "same scores" if results["reload_difference"] == 0 else f"scores differ by {results['reload_difference']:.1e}"
    )
    print(f"\n{TITLES[results['method']]} on {results['dataset']}, {results['model']}")
    print(f"  trained parameters  {results['trained_parameters']:,} ({share:.2%}, head included)")
    print(f"  accuracy before     {results['accuracy_before']:.2%}")
    print(f"  accuracy after      {results['accuracy_after']:.2%} ({results['train_seconds']:.0f} s of training)")
    print(f"  saved               {results['saved_bytes'] / 1e6:.2f} MB in {output / 'adapter'}")
    print(f"  loaded again        {same}\n")
    if "cost" in results:
        print_costs(results["cost"])
        print(f"written to {output}: results.json, cost.json, cost.png")


if __name__ == "__main__":
    try:
        main()
    except (DownloadError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
