"""Tables of the results page, from the JSON lines."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from itertools import pairwise

from benchmarks.markdown import markdown_table
from benchmarks.results import Record, read
from benchmarks.times import HEADER, ratios, time_cell
from benchmarks.titles import method_name

CURVES = ("train_loss", "test_loss", "test_accuracy")
GRADIENT_MODEL = "dinov2-small-saliency"


def spread(values: list[float]) -> float:
    """Standard deviation between seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def curves(name: str) -> dict[str, dict[str, list[list[float]]]]:
    """`{backbone: {variant: one list an epoch of the values of all seeds}}` for one of `CURVES`."""
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in read("curves"):
        found[record["backbone"]][record["variant"]][record["epoch"]].append(record[name])
    return {
        backbone: {variant: [epochs[n] for n in sorted(epochs)] for variant, epochs in variants.items()}
        for backbone, variants in found.items()
    }


def comparison(name: str, backbone: str, variant: str = "4 bits") -> dict[str, float]:
    """How far the mean curve of a variant is from the exact one.

    Returns:
        `"exact"`, `"coded"`: means over the seeds after the last epoch; `"spread"`: standard deviation between seeds
        there, the larger one of both; `"epochs"` and `"within"`: number of epochs, and of those in which the means
        differ by no more than the spread; `"ratio"`: the largest ratio of difference to spread of all epochs.
    """
    variants = curves(name)[backbone]
    both = list(zip(variants[variant], variants["exact"], strict=True))
    noise = [max(spread(coded), spread(exact)) for coded, exact in both]
    ratios = [
        abs(statistics.mean(coded) - statistics.mean(exact)) / max(own, 1e-9)
        for (coded, exact), own in zip(both, noise, strict=True)
    ]
    coded, exact = both[-1]
    return {
        "exact": statistics.mean(exact),
        "coded": statistics.mean(coded),
        "spread": noise[-1],
        "epochs": len(ratios),
        "within": sum(ratio <= 1 for ratio in ratios),
        "ratio": max(ratios),
    }


def curves_table() -> str:
    """Mean of loss and accuracy after the last epoch, and whether the curves lie within the spread between seeds."""
    rows = []
    for name in CURVES:
        for backbone, variants in curves(name).items():
            for variant in variants:
                if variant == "exact" or len(variants[variant][-1]) < len(variants["exact"][-1]):
                    continue  # means over fewer seeds are of other runs
                found = comparison(name, backbone, variant)
                numbers = [f"{found[key]:.3f}" for key in ("exact", "coded", "spread")]
                within = f"{found['within']} of {found['epochs']}"
                label = f"{backbone}, {name.replace('_', ' ')}"
                rows.append([label, variant, *numbers, within, f"{found['ratio']:.2f}"])
    header = [
        "after the last epoch",
        "codes",
        "exact",
        "coded",
        "spread of seeds",
        "epochs within",
        "largest difference / spread",
    ]
    return markdown_table(header, sorted(rows), left=2)


def layouts_table(model: str) -> str:
    """Error of the gradient and bits kept for each layout of one model; the least error at 4 bits first.

    Errors are means over the batches of images; a mean over several of them has a star.
    """
    cells: dict[str, dict[int, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in read("attention_layouts"):
        if record["model"] == model:
            cells[record["layout"]][record["bits"]][record["seed"]] = record
    levels = sorted({bits for found in cells.values() for bits in found}, reverse=True)
    rows = []
    for layout, found in cells.items():
        extra = next(record["kept_bits"] - bits for bits, seeds in found.items() for record in seeds.values())
        errors = {bits: statistics.mean(r["error"] for r in seeds.values()) for bits, seeds in found.items()}
        shown = [f"{errors[bits]:.4f}{'*' * (len(found[bits]) > 1)}" if bits in errors else "–" for bits in levels]
        rows.append((errors.get(levels[0], float("inf")), [layout, f"b + {extra:.2f}", *shown]))
    header = ["layout", "bits kept", *[f"b = {bits}" for bits in levels]]
    return markdown_table(header, [row for _, row in sorted(rows)])


def gradient_errors() -> dict[str, float]:
    """`{configuration as JSON: error of the adapter's gradient}` on real weights and images, the newest of each."""
    found = {}
    for record in read("gradient_error"):
        if record["model"] == GRADIENT_MODEL and "config" in record:
            found[json.dumps(record["config"], sort_keys=True)] = record["error"]
    return found


def pareto_records(model: str, dtype: str, batch: int = 8) -> dict[str, Record]:
    """Memory and time of every method of one model, joined by title; the newest of each counts."""
    joined: dict[str, Record] = {}
    for part in ("memory", "time"):
        for record in read(f"pareto_{part}"):
            if (record["model"], record["dtype"], record["batch"]) == (model, dtype, batch):
                joined.setdefault(record["title"], {}).update(record)
    return joined


def pareto_table(model: str, dtype: str) -> str:
    """One row a method: kept and peak; time where it was measured; for the first model the error of the gradient."""
    errors = gradient_errors()
    records = pareto_records(model, dtype).values()
    times = ratios(model, dtype)
    rows = []
    for record in records:
        row = [
            method_name(record),
            *(f"{record[key]:.1f}" if key in record else "–" for key in ("kept_mb_per_image", "peak_mb_per_image")),
        ]
        if times:
            row.append(time_cell(times.get(record["title"])))
        if (model, dtype) == ERRORS_BESIDE:
            error = errors.get(json.dumps(record["config"], sort_keys=True))
            row.append("exact" if record["method"] != "s2a" else "–" if error is None else f"{error:.3f}")
        rows.append(row)
    header = [f"{model}, {dtype}", "kept, MB/image", "peak, MB/image", *[HEADER] * bool(times)]
    return markdown_table(header + ["gradient error"] * ((model, dtype) == ERRORS_BESIDE), rows)


ERRORS_BESIDE = ("vit_b16", "float32")
"""Where errors of gradients, which are those of another transformer in float32, stand beside memory and time."""


def whole_job_table(model: str = "vit_b16", batch: int = 24) -> str:
    """Peak of the whole job, dtypes across; in brackets a real run's."""
    cells: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in read("whole_job"):
        if record["model"] == model and record["batch"] == batch:
            known = cells[method_name(record)].get(record["dtype"])
            if known and record["real_peak_mb"] is None and record["peak_mb"] == known["peak_mb"]:
                continue
            cells[method_name(record)][record["dtype"]] = record
    dtypes = ("float32", "bfloat16")

    def cell(record: Record | None) -> str:
        if record is None:
            return "–"
        real = record["real_peak_mb"]
        return f"{record['peak_mb']:.0f}" + ("" if real is None else f" ({real:.0f})")

    rows = [[title, *[cell(found.get(dtype)) for dtype in dtypes]] for title, found in cells.items()]
    return markdown_table([f"MB, {model}, batch of {batch}", *dtypes], rows)


def linear_table() -> str:
    """Peaks over the batch and the slopes between them."""
    newest = {(record["model"], record["title"]): record for record in read("linear")}
    rows = []
    header: list[str] = []
    for (model, title), record in newest.items():
        batches = record["batches"]
        header = [f"peak at {size}, MB" for size in batches]
        header += [f"{low} to {high}, MB/image" for low, high in pairwise(batches)]
        slopes = [f"{slope:.2f}" for slope in record["slopes_mb_per_image"]]
        rows.append([f"{model}, {title}", *[f"{peak:.0f}" for peak in record["peak_mb"]], *slopes])
    return markdown_table(["S2A", *header], rows)


def leak_table() -> str:
    """What is live after few and after many steps."""
    newest = {record["title"]: record for record in read("leak")}
    rows = []
    for title, record in newest.items():
        pairs = [f"{before} / {after}" for before, after in (record["tensors"], record["bytes"])]
        rows.append([title, *pairs, str(record["allocator_growth_in_last_steps"])])
    return markdown_table(["S2A", "tensors after 10 / 200 steps", "bytes", "growth in the last 5 steps, bytes"], rows)


def gradient_error_table(model: str) -> str:
    """The newest error of each setting of one model."""
    newest: dict[tuple[str, str], Record] = {}
    for record in read("gradient_error"):
        if record["model"] == model:
            fields = dict(record.get("config", {}))
            bits = fields.pop("activation_bits", record["bits"])
            fields.pop("activation_policy", None)
            shown = f"{bits} bits" if isinstance(bits, int) else "4 bits"
            extra = "".join(f", {name} {value}" for name, value in fields.items())
            newest[record["coded"], shown + extra] = record
    rows = [[coded, shown, f"{record['error']:.4f}"] for (coded, shown), record in newest.items()]
    return markdown_table([model, "codes", "error"], rows)


def allocation_table(model: str) -> str:
    """Errors of one number of bits everywhere and of calibrated bits; the newest result of each counts."""
    newest = {
        (r["kind"], r.get("groups"), r["bits"], r.get("share", 0)): r
        for r in read("allocation")
        if r["model"] == model and r["kind"] in ("uniform", "auto")
    }
    reference = newest.get(("uniform", None, 4, 0))
    if reference is None:
        return ""
    rows = []
    for (kind, groups, bits, share), record in sorted(newest.items(), key=lambda item: (item[0][2], item[1]["error"])):
        name = f"{bits} everywhere" if kind == "uniform" else f"auto, {bits:g}, by {groups}"
        expected, kept = record.get("expected_error"), record.get("kept_mb")
        rows.append(
            [
                name + (f", up to {share:.0%} rebuilt" if share else ""),
                f"{record['average_bits']:.2f}" if kind == "auto" else f"{bits}",
                "–" if kept is None else f"{kept:.2f}",
                f"{record['error']:.3f}",
                f"{record['error'] / reference['error']:.2f}",
                "–" if expected is None else f"{expected:.3f}",
            ]
        )
    header = ["bits", "kept on average", "MB an image", "error", "against 4 everywhere", "expected"]
    return markdown_table(header, rows)


def allocation_costs_table() -> str:
    """What a calibration takes; the newest result of each counts."""
    newest = {(r["model"], r["groups"]): r for r in read("allocation") if r["kind"] == "cost"}
    rows = [
        [
            f"{model}, by {groups}",
            f"{r['calibration_seconds']:.0f}",
            f"{r['steps_of_8']:.0f}",
            f"{r['steps_of_32']:.0f}",
            "–" if r["calibration_peak_mb"] is None else f"{r['calibration_peak_mb']:.1f}",
            f"{r['exact_peak_mb']:.1f}",
        ]
        for (model, groups), r in newest.items()
    ]
    return markdown_table(
        ["model", "seconds", "steps of 8", "steps of 32", "peak, MB", "exact training, one image, MB"], rows
    )


def ablations_table() -> str:
    """One row a choice and value, all measures joined; the newest result of each counts."""
    joined: dict[tuple[str, str], Record] = defaultdict(dict)
    for record in read("ablations"):
        joined[record["choice"], record["value"]].update(record)
    shown = (
        ("kept_mb_per_image", ".2f"),
        ("peak_mb_per_image", ".1f"),
        ("trainable_without_head", ",d"),
        ("error", ".3f"),
        ("ratio", ".2f"),
    )
    rows = [
        [choice, value, *[format(record[name], style) if name in record else "" for name, style in shown]]
        for (choice, value), record in joined.items()
    ]
    header = ["changed", "to", "kept, MB/image", "peak, MB/image", "trained", "gradient error", "step time"]
    return markdown_table(header, rows, left=2)
