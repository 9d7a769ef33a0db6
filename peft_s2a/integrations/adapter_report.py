"""What is in the folder of an adapter, read without the base model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = {
    "bias delta": ("s2a_bias",),
    "prompt": ("s2a_prompt",),
    "side branch": ("s2a_side",),
    "batch norm": ("s2a_r", "s2a_n"),
}
"""Parts of an adapter, and how the last components of their tensors' names begin."""
WHOLE = "saved whole"


@dataclass(frozen=True)
class AdapterPart:
    """Tensors of one part.

    Attributes:
        name: a key of `PARTS`, or `WHOLE` for modules such as the head.
        tensors: their number.
        parameters: their elements.
        bytes: their size.
    """

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """An adapter: its parts, and how its configuration says that activations are kept.

    Attributes:
        folder: where it is.
        settings: fields of the configuration.
        parts: the tensors.
        allocation: calibrated bits, as `Allocation.as_dict` gives them.
    """

    folder: str
    settings: dict[str, Any]
    parts: tuple[AdapterPart, ...]
    allocation: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report in types that `json` can write."""
        return asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draws the parameters of each part; `path`'s suffix is the format.

        Raises:
            ImportError: without matplotlib, which `peft-s2a[examples]` installs.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 0.5 * len(self.parts) + 1.5), layout="constrained")
        axes = figure.subplots()
        axes.barh([part.name for part in self.parts], [part.parameters for part in self.parts])
        axes.invert_yaxis()
        axes.set(xlabel="parameters", title=self.folder)
        figure.savefig(path)


SETTINGS = (
    "base_model_name_or_path",
    "activation_bits",
    "activation_target_bits",
    "activation_groups",
    "activation_policy",
    "prompt_rank",
    "side_reduction",
    "use_bias",
    "train_batch_norm",
    "image_size",
    "modules_to_save",
    "memory_budget",
    "memory_plan",
)
"""Fields of the configuration that are shown, where they are set."""
AUTO_SETTINGS = ("activation_target_bits", "activation_groups")
"""Those that say something with `activation_bits="auto"` alone."""


def adapter_report(folder: str | Path) -> AdapterReport:
    """Reads `adapter_config.json` and the names and shapes in `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: if the adapter is of another method.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not the folder of a saved adapter.")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "S2A":
        raise ValueError(f"{folder} holds an adapter of the method {config.get('peft_type')}, not of S2A.")
    sums: dict[str, list[int]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            tensor = file.get_tensor(key)
            counts = sums.setdefault(_part(key), [0, 0, 0])
            for index, value in enumerate((1, tensor.numel(), tensor.nbytes)):
                counts[index] += value
    order = [name for name in (*PARTS, WHOLE) if name in sums]
    parts = tuple(AdapterPart(name, *sums[name]) for name in order)
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    if config.get("activation_bits") != "auto":
        settings = {name: value for name, value in settings.items() if name not in AUTO_SETTINGS}
    return AdapterReport(str(folder), settings, parts, config.get("activation_allocation"))


def _part(key: str) -> str:
    leaf = key.rpartition(".")[2]
    return next((name for name, starts in PARTS.items() if leaf.startswith(starts)), WHOLE)
