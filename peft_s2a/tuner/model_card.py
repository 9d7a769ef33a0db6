"""Sections of a model card: how an adapter is loaded, and what it is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOADING = "## How to load this S2A adapter"
METHOD = "## Method"

LOADING_TEXT = """This adapter was made with peft-s2a, which adds the method `S2A` to PEFT. Without
`import peft_s2a` PEFT does not know the method and stops with `KeyError: 'S2A'`.

```python
import peft_s2a  # registers the method S2A with PEFT
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```"""


def card_in(directory: str | os.PathLike[str]) -> Path:
    """The card of the directory, begun if there is none."""
    path = Path(directory) / "README.md"
    if not path.exists():
        path.write_text("---\nlibrary_name: peft\ntags:\n- s2a\n---\n", encoding="utf-8")
    return path


def put_section(card: Path, heading: str, text: str) -> None:
    """Puts a section into a card, in the place of one with the same heading or at the end; the rest stays."""
    whole = card.read_text(encoding="utf-8")
    section = f"{heading}\n\n{text}\n"
    old = re.compile(rf"^{re.escape(heading)}\n.*?(?=^#{{1,6}} |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(whole):
        whole = old.sub(lambda found: section + ("\n" if found.end() < len(whole) else ""), whole, count=1)
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    card.write_text(whole, encoding="utf-8")


def put_own_sections(directory: str | os.PathLike[str], config: Any, base_class: Mapping[str, Any] | None) -> None:
    """Writes into the `README.md` of the directory how its adapter is loaded, and by which method it was made.

    Args:
        config: the `S2AConfig` of the adapter.
        base_class: PEFT's `{"base_model_class", "parent_library"}`, where it is known.
    """
    card = card_in(directory)
    put_section(card, LOADING, LOADING_TEXT.format(base=_base(config, base_class)))
    put_section(card, METHOD, _method(config))


def _base(config: Any, base_class: Mapping[str, Any] | None) -> str:
    known = base_class or {"parent_library": "transformers", "base_model_class": "AutoModelForImageClassification"}
    if not str(known.get("parent_library")).startswith("transformers"):
        return "\nbase_model = ...  # made as it was for training"
    name, path = known["base_model_class"], config.base_model_name_or_path or "path/to/the/base/model"
    return f'from transformers import {name}\n\nbase_model = {name}.from_pretrained("{path}")'


def _method(config: Any) -> str:
    parts = [
        "deltas of biases" if config.use_bias else "",
        f"a prompt of rank {config.prompt_rank} for each block" if config.prompt_rank else "",
        f"a side branch on 1/{config.side_reduction} of each block's channels" if config.side_reduction else "",
        *(f"`{name}` as a whole" for name in config.modules_to_save or ()),
    ]
    lines = {
        "Method": "S2A (arXiv 2503.08154)",
        "Base model": f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "without a name",
        "Trained": ", ".join(part for part in parts if part),
        "Bits of kept activations": f"`{config.activation_bits}`",
        "Policy of activations": f"`{config.activation_policy}`",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())
