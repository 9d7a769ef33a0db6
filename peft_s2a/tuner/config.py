"""The configuration of an S2A adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ..memory.budget import parse_bytes
from ..precision import GROUPINGS, Allocation
from ..settings import BIT_LEVELS, ActivationSettings, Rounding
from ..structure import BlockShape
from .model_card import put_own_sections
from .registration import add_peft_type

AUTO = "auto"
"""The value of `activation_bits` with which bits are calibrated."""


@dataclass
class S2AConfig(PeftConfig):
    """Configuration of S2A (arXiv 2503.08154): what is trained and in how many bits activations are kept.

    Args:
        target_modules: layers that get a bias delta: a list of names (exact, or endings), a regular expression that
            matches full names, `"all-linear"`, or `None` for every linear, convolution and norm layer of the
            backbone. `None` and `"all-linear"` become a regular expression when the adapter is made, without the
            layers that no output of the model depends on. A layer behind an output that the loss does not use (the
            pooler of a bare backbone trained on its tokens) stays and gets no gradient: exclude it for distributed
            training.
        exclude_modules: layers and blocks to leave alone, names or a regular expression.
        modules_to_save: modules trained and saved whole, such as the head.
        layers_to_transform: indices of the layers to adapt, applied to target layers and blocks.
        layers_pattern: name of the container that `layers_to_transform` counts in; default: the first numbered one.
        block_modules: blocks that get prompt and side branch, names or a regular expression; `None`: found from the
            model's structure.
        use_bias: whether bias deltas are trained.
        prompt_rank: rank r of the prompt; 0: no prompt.
        side_reduction: channels averaged into one for the side branch; 0: no side branch.
        prompt_rank_pattern: other ranks for some blocks: {name, ending or regular expression on the name: rank}; the
            first that matches counts, as in LoRA's `rank_pattern`.
        side_reduction_pattern: the same for `side_reduction`.
        init_weights: `True` starts as the identity; `False` starts at random (for tests).
        image_size: size of the images that will be trained on, when it is not the model's own: one number, or height
            and width (depth first for volumes). Prompts are made for the tokens of such an image (a DINOv2 made for
            518 px but trained at 112 px gets 8 x 8 + 1 rows, not 37 x 37 + 1); other sizes are interpolated at run
            time. Saved with the adapter; models that ask for `interpolate_pos_encoding=True` still need it.
        activation_bits: bits per kept element: 1, 2, 3, 4, 6, 8, a mapping {operator kind: bits}, `None` for exact, or
            `"auto"`: shared out among the operators by what their errors do to the gradient. That is measured on the
            first images of the first training batch, or by `peft_s2a.calibrate`.
            What torch's own functions save is coded where their backward multiplies with it, in 8 bits unless a
            mapping sets `"other"`, or divides by it, in bfloat16.
        activation_target_bits: with `"auto"`, the average bits per kept element over all operators with codes.
        activation_groups: with `"auto"`, what gets bits of its own: `"kind"`, each kind of operator, or `"instance"`,
            each single operator, which takes longer to measure and has less error.
        activation_allocation: what `"auto"` led to, `Allocation.as_dict()`; filled in by the calibration and saved, so
            that loading calibrates nothing.
        activation_backend: `"eager"`: the kernels of the codecs run as plain PyTorch; `"compile"`: compiled by
            `torch.compile`; `"auto"`: compiled on CUDA, eager elsewhere. `explain_backend()` tells what runs. A
            `torch.compile(model)` traces them together with the model, whatever is set.
        activation_rounding: `"nearest"`, or `"stochastic"`: up with the probability of the fraction, reproducibly for
            `torch.manual_seed`, also where a block is computed again. Levels of derivatives are always the nearest.
        activation_policy: what is kept at all. `"keep"`: codes of what each operator needs. `"rebuild"`: where an
            operator's input is a linear image of a normalised input, that one alone, from which the rest is made again
            in backward. `"recompute"`: a block's input alone; the block runs again in backward. Or a mapping
            {operator kind: "keep" or "rebuild", "block": "keep" or "recompute"}. The kinds `"source"` and `"block"` of
            `activation_bits` are the bits of normalised and of block inputs kept for this; 8 unless set. `"auto"`, for
            all kinds or for one, goes with `activation_bits="auto"`: the calibration chooses what is rebuilt.
        activation_rebuild_share: with `"auto"`, how much may be made again in backward, which takes time: 1 is
            everything that could be, 0 nothing; counted in multiplications.
        backward_precision: how products of backward with frozen float32 weights are taken: gradients, and what is made
            again. In the words of `torch.set_float32_matmul_precision`, `"medium"`: in bfloat16 with sums in float32
            where the device multiplies that faster (CPUs with AVX512-BF16 or AMX, CUDA from compute capability 8.0
            on); `"highest"`: in float32; `"auto"`: as `"medium"`, whose error is far below that of the codes, unless
            `activation_bits=None`. Forward is always taken in full, and models in bfloat16 or float16 as they are.
        train_batch_norm: whether running statistics of batch norms are trained and saved with the adapter; by default
            they are frozen.
        block_shapes: shapes of the blocks' inputs, found by a shape-only run of the model and saved, so that loading
            needs no such run: {block name: {"layout", "channels", "out_channels", "grid", "num_extra"}}.
        batch_norm_modules: the batch norms of `train_batch_norm`, filled in when the adapter is made.
        memory_budget: memory of the device, such as `"8GB"` or a number of bytes, that a training step has to fit. When
            the adapter is made, the fastest policy that fits at `activation_bits` is taken, and fewer bits if none
            does; see `peft_s2a.plan`. The plan is for AdamW and the model's dtype.
        planned_batch_size: images in a step, on one device; needed with `memory_budget`.
        memory_plan: what was chosen and its predicted peak in bytes; filled in when the adapter is made and saved, so
            that loading plans nothing.

    Raises:
        ValueError: for values outside these.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers with a bias delta: names, a regex, 'all-linear' or None for all."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers and blocks to leave alone: names or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, such as the head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the container that layers_to_transform counts in."}
    )
    block_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Blocks with prompt and side branch: names, a regex or None to find them."}
    )
    use_bias: bool = field(default=True, metadata={"help": "Whether bias deltas are trained."})
    prompt_rank: int = field(default=8, metadata={"help": "Rank of the prompt; 0 switches it off."})
    side_reduction: int = field(
        default=16, metadata={"help": "Channels averaged into one for the side branch; 0 switches it off."}
    )
    prompt_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for some blocks: {name or regex: rank}."}
    )
    side_reduction_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other side reductions for some blocks: {name or regex: reduction}."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})
    image_size: int | tuple[int, ...] | list[int] | None = field(
        default=None,
        metadata={"help": "Size of the images that will be trained on, when it is not the model's own."},
    )
    activation_bits: int | str | dict[str, int | None] | None = field(
        default=4, metadata={"help": "Bits per kept element: 1, 2, 3, 4, 6, 8, {kind: bits}, 'auto' or None for exact."}
    )
    activation_target_bits: float = field(
        default=4, metadata={"help": "Average bits per kept element for activation_bits='auto'."}
    )
    activation_groups: str = field(
        default="kind", metadata={"help": "What activation_bits='auto' gives bits of its own: 'kind' or 'instance'."}
    )
    activation_allocation: dict[str, Any] | None = field(
        default=None, metadata={"help": "What activation_bits='auto' led to; filled in by the calibration."}
    )
    activation_backend: str = field(default="auto", metadata={"help": "'auto', 'eager' or 'compile'."})
    activation_rounding: Rounding = field(default="nearest", metadata={"help": "'nearest' or 'stochastic'."})
    activation_policy: str | dict[str, str] = field(
        default="keep", metadata={"help": "'keep', 'rebuild', 'recompute', 'auto' or {kind: policy}."}
    )
    activation_rebuild_share: float = field(
        default=1.0, metadata={"help": "Share of what could be rebuilt that may be with activation_policy='auto'."}
    )
    backward_precision: str = field(
        default="auto", metadata={"help": "Products of backward in float32 models: 'auto', 'medium' or 'highest'."}
    )
    train_batch_norm: bool = field(
        default=False, metadata={"help": "Whether running statistics of batch norms are trained with the adapter."}
    )
    block_shapes: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Shapes of the blocks' inputs; filled in when the adapter is made."}
    )
    batch_norm_modules: list[str] | None = field(
        default=None, metadata={"help": "Batch norms with trained statistics; filled in when the adapter is made."}
    )

    memory_budget: str | int | None = field(
        default=None, metadata={"help": "Memory that a training step has to fit, such as '8GB'."}
    )
    planned_batch_size: int | None = field(
        default=None, metadata={"help": "Images in a step, for which memory_budget is planned."}
    )
    memory_plan: dict[str, Any] | None = field(
        default=None, metadata={"help": "What memory_budget led to; filled in when the adapter is made."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        for name in ("target_modules", "exclude_modules", "block_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        sizes = {name: getattr(self, name) for name in ("prompt_rank", "side_reduction")}
        for pattern in ("prompt_rank_pattern", "side_reduction_pattern"):
            setattr(self, pattern, getattr(self, pattern) or {})
            sizes |= {f"{pattern}[{key!r}]": value for key, value in getattr(self, pattern).items()}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, 0 to switch the part off.")
        if not (self.use_bias or self.uses_blocks()):
            raise ValueError(
                "Every part is switched off: set use_bias=True, prompt_rank or side_reduction to train something."
            )
        self.image_size = _checked_size(self.image_size)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is set without layers_to_transform: name the layers, or drop the pattern.")
        check_target(self.activation_target_bits)
        check_share(self.activation_rebuild_share)
        if self.activation_groups not in GROUPINGS:
            raise ValueError(f"activation_groups={self.activation_groups!r} is not one of {', '.join(GROUPINGS)}.")
        if self.activation_allocation is not None and self.activation_bits != AUTO:
            raise ValueError(
                f"activation_allocation goes with activation_bits='auto', not with {self.activation_bits!r}: leave one "
                "of them out."
            )
        if self.activation_settings().optional and self.activation_bits != AUTO:
            raise ValueError(
                "activation_policy='auto' goes with activation_bits='auto', whose calibration chooses what is rebuilt; "
                f"with activation_bits={self.activation_bits!r} choose 'keep', 'rebuild' or 'recompute'."
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
            size = self.planned_batch_size
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"memory_budget needs planned_batch_size, the number of images in a step, and not {size!r}."
                )
        for shape in (self.block_shapes or {}).values():
            BlockShape.from_dict(shape)

    def uses_blocks(self) -> bool:
        """Whether some block has a prompt or a side branch."""
        patterns = (*self.prompt_rank_pattern.values(), *self.side_reduction_pattern.values())
        return bool(self.prompt_rank or self.side_reduction or any(patterns))

    def block_sizes(self, key: str) -> tuple[int, int]:
        """Rank of the prompt and reduction of the side branch of the block with this full name."""
        return (
            self.prompt_rank_pattern.get(get_pattern_key([*self.prompt_rank_pattern], key), self.prompt_rank),
            self.side_reduction_pattern.get(get_pattern_key([*self.side_reduction_pattern], key), self.side_reduction),
        )

    def activation_settings(self) -> ActivationSettings:
        """The settings that the fields `activation_...` stand for.

        With `activation_bits="auto"` they are those of the least number of bits that is no less than the target, until
        the calibration has shared them out.
        """
        settings = self.settings_before_calibration()
        if self.activation_bits != AUTO or self.activation_allocation is None:
            return settings
        return settings.allocated(Allocation.from_dict(self.activation_allocation).bits)

    def settings_before_calibration(self) -> ActivationSettings:
        """The settings without what a calibration has found."""
        bits = self.activation_bits
        if bits == AUTO:
            bits = next(bits for bits in BIT_LEVELS if bits >= self.activation_target_bits)
        return ActivationSettings.from_config(
            bits, self.activation_backend, self.activation_policy, self.activation_rounding, self.backward_precision
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves `adapter_config.json`, and in `README.md` how the adapter is loaded and what it is."""
        super().save_pretrained(str(save_directory), **kwargs)
        put_own_sections(save_directory, self, kwargs.get("auto_mapping_dict"))


def check_target(bits: Any) -> None:
    """Refuses average bits that no allocation has.

    Raises:
        ValueError: for anything but a number from 1 to 8.
    """
    low, high = BIT_LEVELS[0], BIT_LEVELS[-1]
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not low <= bits <= high:
        raise ValueError(f"activation_target_bits={bits!r} must be a number from {low} to {high}.")


def check_share(share: Any) -> None:
    """Refuses shares that there are none of.

    Raises:
        ValueError: for anything but a number from 0 to 1.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"activation_rebuild_share={share!r} must be a number from 0 to 1.")


def _checked_size(size: Any) -> int | tuple[int, ...] | None:
    """The image size, a list of sizes as a tuple."""
    if size is None:
        return None
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if not 2 <= len(sizes) <= 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"image_size={size!r} must be a positive whole number or a list of two or three of them.")
    return sizes if isinstance(size, (tuple, list)) else size
