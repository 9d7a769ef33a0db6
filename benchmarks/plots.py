"""Plots of the documentation, from the JSON lines: `docs/images/*.png`.

python -m benchmarks.plots                # all of them
python -m benchmarks.plots curves pareto
"""

from __future__ import annotations

import argparse
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import IMAGES, read
from benchmarks.summaries import CURVES, curves, pareto_records, spread
from benchmarks.times import PROCESSORS, ratios
from benchmarks.titles import method_name
from benchmarks.transfer_plan import BACKBONES
from benchmarks.transfer_tables import points
from peft_s2a import Allocation

COLORS = {
    "exact": "tab:blue",
    "4 bits": "tab:orange",
    "2.5 bits on average": "tab:red",
    "2.5 bits, rebuilt where it pays": "tab:green",
}


def plot_curves() -> None:
    """Mean over the seeds with a band of one standard deviation, and every seed thinly; backbones down."""
    found = {name: curves(name) for name in CURVES}
    backbones = list(found[CURVES[0]])
    if not backbones:
        return
    figure = Figure(figsize=(11, 3 * len(backbones)), layout="constrained")
    all_axes = figure.subplots(len(backbones), len(CURVES), squeeze=False)
    for row, backbone in zip(all_axes, backbones, strict=True):
        for axes, name in zip(row, CURVES, strict=True):
            for variant, epochs in found[name][backbone].items():
                numbers = range(1, len(epochs) + 1)
                means = [statistics.mean(values) for values in epochs]
                noise = [spread(values) for values in epochs]
                low = [mean - deviation for mean, deviation in zip(means, noise, strict=True)]
                high = [mean + deviation for mean, deviation in zip(means, noise, strict=True)]
                color = COLORS[variant]
                axes.plot(numbers, means, color=color, label=variant, linestyle="-" if variant == "exact" else "--")
                axes.fill_between(numbers, low, high, color=color, alpha=0.2, linewidth=0)
                for seed in zip(*epochs, strict=False):
                    axes.plot(range(1, len(seed) + 1), seed, color=color, linewidth=0.5, alpha=0.6)
                axes.set_xticks(list(numbers))
            axes.set(title=f"{backbone}, {name.replace('_', ' ')}", xlabel="epoch")
            axes.title.set_fontsize(9)
            axes.legend()
    figure.savefig(IMAGES / "curves.png", dpi=110)


PROCESSOR_TITLES = {True: "products in bfloat16 faster than in float32", False: "products in bfloat16 not faster"}


def plot_pareto() -> None:
    """Step time against peak, one picture a model and dtype, the two kinds of processors side by side."""
    for model, dtype in sorted({(record["model"], record["dtype"]) for record in read("pareto_time")}):
        times = ratios(model, dtype)
        panels: dict[bool, list[tuple[str, float, float, bool]]] = {fast: [] for fast in PROCESSORS}
        for title, record in pareto_records(model, dtype).items():
            for fast, ratio in times.get(title, {}).items():
                if "peak_mb_per_image" in record:
                    own = record["method"] == "s2a"
                    panels[fast].append((method_name(record), record["peak_mb_per_image"], ratio, own))
        shown = {fast: found for fast, found in panels.items() if found}
        if not shown:
            continue
        figure = Figure(figsize=(7 * len(shown), 5), layout="constrained")
        figure.suptitle(f"{model}, {dtype}, batch of 8: lower left is better")
        all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, fast in zip(all_axes, shown, strict=True):
            _scatter(axes, shown[fast])
            axes.set_title(PROCESSOR_TITLES[fast], fontsize=10)
        all_axes[0].set_ylabel("step time / bias tuning in stock torch")
        figure.savefig(IMAGES / f"pareto-{model}-{dtype}.png", dpi=110)


def _scatter(axes: Axes, methods: list[tuple[str, float, float, bool]]) -> None:
    """Title, peak, time and whether it is S2A's, of each method."""
    for own, color in ((False, "tab:gray"), (True, "tab:red")):
        chosen = [point for point in methods if point[3] == own]
        label = "S2A" if own else "others"
        axes.scatter([p[1] for p in chosen], [p[2] for p in chosen], color=color, zorder=3, label=label)
    # labels to the right, moved down in turn where neighbours are close
    taken: list[tuple[float, float]] = []
    top = max(p[2] for p in methods)
    step = 0.03 * max(top - min(p[2] for p in methods), 0.2)
    for title, peak, ratio, _ in sorted(methods, key=lambda p: (-p[2], p[1])):
        height = ratio
        while any(abs(height - other) < step * 1.3 and 0.4 < peak / x < 2.5 for x, other in taken):
            height -= step
        taken.append((peak, height))
        axes.annotate(
            title,
            (peak, ratio),
            (peak * 1.04, height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray"} if height != ratio else None,
        )
    axes.set_xscale("log")
    axes.set_xlim(min(p[1] for p in methods) / 1.2, max(p[1] for p in methods) * 2)
    axes.set_xlabel("peak above the loaded model, MB per image")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper center")


def plot_allocation() -> None:
    """Bits by layer and operator, of each model's newest calibration by instance to 4 bits with nothing rebuilt."""
    newest = {
        record["model"]: record
        for record in read("allocation")
        if (record["kind"], record.get("groups"), record["bits"]) == ("auto", "instance", 4) and not record.get("share")
    }
    for model, record in newest.items():
        allocation = {"by": "instance", "target_bits": record["bits"], "groups": record["allocation"]}
        Allocation.from_dict(allocation).plot(IMAGES / f"allocation-{model}.png")


def plot_transfer() -> None:
    """Mean accuracy over the data sets against peak, with the spread between seeds; one picture a backbone."""
    for model in BACKBONES:
        found = points(model)
        if not found:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for title, peak, mean, deviation, own in found:
            axes.errorbar(peak, mean, deviation, color="tab:red" if own else "tab:gray", marker="o", capsize=3)
            axes.annotate(title, (peak, mean), (4, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(point[1] for point in found) / 1.2, max(point[1] for point in found) * 2)
        axes.set(
            xlabel="peak of a step above the loaded model, MB per image",
            ylabel="accuracy, mean over the data sets",
            title=f"{model}: upper left is better",
        )
        axes.grid(alpha=0.3, which="both")
        figure.savefig(IMAGES / f"transfer-{model}.png", dpi=110)


PLOTS = {"curves": plot_curves, "pareto": plot_pareto, "allocation": plot_allocation, "transfer": plot_transfer}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PLOTS), help=", ".join(PLOTS))
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        PLOTS[name]()


if __name__ == "__main__":
    main()
