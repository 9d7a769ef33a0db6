"""The same result in every process of a distributed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def agreed(compute: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What `compute` gives in the first process, in all of them; every process calls it.

    All compute, since a model may need the others (synchronised batch norms). The result travels as JSON.

    Raises:
        ValueError: in every other process, if `compute` raises anything in one.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return compute()
    error: Exception | None = None
    result: dict[str, Any] = {}
    try:
        result = compute()
    except Exception as caught:  # raised again below, once the others know
        error = caught
    failures = torch.tensor([float(error is not None)], device=device)
    dist.all_reduce(failures)
    if error is not None:
        raise error
    if failures.item():
        raise ValueError("Calibration failed in another process; the reason is in that process's error.")
    text = json.dumps(result).encode()
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, src=0)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, src=0)
    found: dict[str, Any] = json.loads(bytes(content.tolist()))
    return found
