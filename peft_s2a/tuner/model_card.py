"""The section of the model card that says how an adapter is loaded."""

from __future__ import annotations

import os
from pathlib import Path

HEADING = "## How to load this S2A adapter"

SECTION = """{heading}

This adapter was made with peft-s2a, which adds the method `S2A` to PEFT. Without
`import peft_s2a` PEFT does not know the method and stops with `KeyError: 'S2A'`.

```python
import peft_s2a  # registers the method S2A with PEFT
from peft import PeftModel
from transformers import AutoModelForImageClassification

base_model = AutoModelForImageClassification.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```
"""


def add_usage(directory: str | os.PathLike[str], base_model: str | None) -> None:
    """Puts the section into the `README.md` of the directory, once; the rest of a card that is there stays."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "---\nlibrary_name: peft\ntags:\n- s2a\n---\n"
    if HEADING in text:
        return
    section = SECTION.format(heading=HEADING, base_model=base_model or "path/to/the/base/model")
    path.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")
