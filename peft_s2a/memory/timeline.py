"""Live bytes over the time of one training step, as data and as a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .allocator import MemoryEvent, record_memory_events
from .peak import prepared_step
from .running import Batch, model_device


@dataclass(frozen=True)
class Timeline:
    """Allocations and frees of one training step, in order.

    Attributes:
        events: what happened; `events[i].phase` is `"forward"`, `"backward"` or `"optimizer"`, `""` after the last.
        live_bytes: bytes live after each event, above what was live before the step.
    """

    events: tuple[MemoryEvent, ...]
    live_bytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were live."""
        return max(self.live_bytes, default=0)

    def live_at_peak(self) -> list[MemoryEvent]:
        """The allocations that are live at the (first) peak, largest first: what the peak is made of."""
        live: dict[int, MemoryEvent] = {}
        if self.events:
            for event in self.events[: self.live_bytes.index(self.peak_bytes) + 1]:
                if event.bytes > 0:
                    live[event.block] = event
                else:
                    del live[event.block]
        return sorted(live.values(), key=lambda event: -event.bytes)

    def as_dict(self) -> dict[str, Any]:
        """The timeline in types that `json` can write."""
        return {
            "peak_bytes": self.peak_bytes,
            "events": [
                asdict(event) | {"live_bytes": live} for event, live in zip(self.events, self.live_bytes, strict=True)
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Draws live megabytes (1e6 bytes) over milliseconds, with phases and peak; `path`'s suffix is the format.

        Raises:
            ImportError: without matplotlib, which `peft-s2a[examples]` installs.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        times = [event.time * 1e3 for event in self.events]
        axes.step(times, [live / 1e6 for live in self.live_bytes], where="post", color="black", linewidth=0.8)
        for phase, color in (("forward", "tab:blue"), ("backward", "tab:orange"), ("optimizer", "tab:green")):
            inside = [time for time, event in zip(times, self.events, strict=True) if event.phase == phase]
            if inside:
                axes.axvspan(inside[0], inside[-1], color=color, alpha=0.12, label=phase)
        peak = self.peak_bytes / 1e6
        axes.axhline(peak, color="tab:red", linewidth=0.8, label=f"peak {peak:.1f} MB")
        axes.set(xlabel="time, ms", ylabel="live above the loaded model, MB", ylim=(0, None))
        axes.legend()
        figure.savefig(path)


def memory_timeline(model: nn.Module, batch: Batch, optimizer: Optimizer | None = None) -> Timeline:
    """Live bytes over one training step, recorded by the profiler; see `peak_step_bytes` for what a step is.

    Args:
        model: any module; it is run in train mode and then put back.
        batch: a mapping for `model(**batch)`, a tuple or list for `model(*batch)`, a tensor for `model(batch)`.
        optimizer: if given, its `step()` is part of the timeline; its state is made before and not counted.

    Raises:
        ValueError: if nothing in the output needs a gradient.
    """
    with prepared_step(model, batch, optimizer) as step:
        events = record_memory_events(step, model_device(model, batch))
    return Timeline(tuple(events), tuple(accumulate(event.bytes for event in events)))
