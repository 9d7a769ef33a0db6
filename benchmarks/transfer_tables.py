"""What the runs of `benchmarks.transfer` say: tables, and the points of the plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.results import Record, read
from benchmarks.summaries import spread
from benchmarks.transfer_plan import DATASETS, SETTING, VARIANTS, rates_of

MB = 1e6
SEEDS = 3
Accuracies = dict[str, dict[str, dict[int, float]]]


def settings_of(model: str) -> list[list[Record]]:
    """The records of a model, apart by setting (the data set is no part of it), in the order of their last records."""
    fields = [name for name in SETTING if name not in ("model", "dataset")]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in read("transfer"):
        if record["model"] == model:
            setting = tuple(record[name] for name in fields)
            found[setting] = [*found.pop(setting, []), record]
    return list(found.values())


def newest_setting(model: str) -> list[Record]:
    """The records of a model that share the setting of the last one."""
    return next(reversed(settings_of(model)), [])


def accuracies(records: list[Record]) -> Accuracies:
    """`{variant: {data set: {seed: accuracy on the test images}}}`."""
    found: Accuracies = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["stage"] == "test":
            found[record["variant"]][record["dataset"]][record["seed"]] = record["accuracy"]
    return found


def costs(records: list[Record]) -> dict[str, Record]:
    """What was measured of each variant, or why it does not exist for the model."""
    return {record["variant"]: record for record in records if record["stage"] == "cost"}


def mean_accuracy(by_dataset: dict[str, dict[int, float]], datasets: list[str]) -> float | None:
    """Mean over the data sets of the means over seeds; `None` unless there is a run on each."""
    if not datasets or any(dataset not in by_dataset for dataset in datasets):
        return None
    return statistics.mean(statistics.mean(by_dataset[dataset].values()) for dataset in datasets)


def share_of_full(found: Accuracies, variant: str) -> float | None:
    """Mean accuracy over that of full fine-tuning, over the runs (data set and seed) that both have.

    `None` unless they have a common run on every data set that full fine-tuning was run on.
    """
    full, own = found.get("full", {}), found.get(variant, {})
    common = {dataset: sorted(set(seeds) & set(own.get(dataset, {}))) for dataset, seeds in full.items()}
    if not common or not all(common.values()):
        return None
    ours = statistics.mean(statistics.mean(own[name][seed] for seed in seeds) for name, seeds in common.items())
    theirs = statistics.mean(statistics.mean(full[name][seed] for seed in seeds) for name, seeds in common.items())
    return ours / theirs


def datasets_of(found: Accuracies) -> list[str]:
    """The data sets that any variant was run on, the benchmark's own first."""
    names = dict.fromkeys(name for by_dataset in found.values() for name in by_dataset)
    return [*(name for name in DATASETS if name in names), *(name for name in names if name not in DATASETS)]


def _cell(seeds: dict[int, float] | None) -> str:
    if not seeds:
        return "–"
    values = list(seeds.values())
    missing = "" if len(values) >= SEEDS else f" ({len(values)})"
    deviation = f" ± {100 * spread(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}{missing}"


def accuracy_table(model: str) -> str:
    """Variants down, data sets across: mean ± standard deviation between seeds, in %; and what it costs."""
    records = newest_setting(model)
    found, measured = accuracies(records), costs(records)
    datasets = datasets_of(found)
    rows = []
    for name, variant in VARIANTS.items():
        cost = measured.get(name)
        if cost is None or (name not in found and "not_applicable" not in cost):
            continue
        if "not_applicable" in cost:
            rows.append([variant.title, *["does not exist"] * len(datasets), *["–"] * 6])
            continue
        mean, share = mean_accuracy(found[name], datasets), share_of_full(found, name)
        rows.append(
            [
                variant.title,
                *[_cell(found[name].get(dataset)) for dataset in datasets],
                "–" if mean is None else f"{100 * mean:.1f}",
                "–" if share is None else f"{100 * share:.1f}",
                f"{trainable_percent(cost):.2f} ({trainable_percent(cost, head=True):.2f})",
                f"{cost['adapter_bytes'] / MB:.2f}",
                *[f"{cost[key] / cost['batch'] / MB:.2f}" for key in ("kept_bytes", "peak_bytes")],
            ]
        )
    header = [
        model,
        *datasets,
        "mean",
        "% of full",
        "trained, % (with head)",
        "saved, MB",
        "kept, MB/image",
        "peak, MB/image",
    ]
    return markdown_table(header, rows)


def earlier_table(model: str) -> str:
    """Accuracies of the settings before the newest, which were not measured for every variant: a row each."""
    rows = []
    columns: dict[str, None] = {}
    for records in settings_of(model)[:-1]:
        found = accuracies(records)
        columns |= dict.fromkeys(datasets_of(found))
    for records in settings_of(model)[:-1]:
        found, first = accuracies(records), records[0]
        setting = f"{first['max_train_samples'] or 'all'} images, {first['epochs']:g} epochs, batch {first['batch']}"
        for name in (name for name in VARIANTS if name in found):
            share = share_of_full(found, name)
            cells = [_cell(found[name].get(dataset)) for dataset in columns]
            share_cell = "–" if share is None else f"{100 * share:.1f}"
            rows.append([f"{VARIANTS[name].title}, {setting}", *cells, share_cell])
    return markdown_table([model, *columns, "% of full"], rows)


def trainable_percent(cost: Record, head: bool = False) -> float:
    """Trained parameters in % of those of the adapted model, with or without the head."""
    trained: Any = cost["trainable" if head else "trainable_without_head"]
    return float(100 * trained / cost["parameters"])


def rates_table(model: str) -> str:
    """The learning rate chosen for each variant and data set; a star where it is an end of the grid."""
    chosen: dict[str, dict[str, float]] = defaultdict(dict)
    for record in newest_setting(model):
        if record["stage"] == "test":
            chosen[record["variant"]][record["dataset"]] = record["learning_rate"]
    datasets = datasets_of(accuracies(newest_setting(model)))
    rows = []
    for name, variant in VARIANTS.items():
        grid = rates_of(name, model, {})
        if name not in chosen or not grid:
            continue
        cells = [
            f"{rate:g}{'*' * (rate in (min(grid), max(grid)))}"
            for rate in (chosen[name].get(dataset) for dataset in datasets)
            if rate is not None
        ]
        cells += ["–"] * (len(datasets) - len(cells))
        rows.append([variant.title, ", ".join(f"{rate:g}" for rate in grid), *cells])
    return markdown_table([model, "grid", *datasets], rows)


README_VARIANTS = (
    "full",
    "linear_probe",
    "bias_only",
    "lora_qv",
    "lora_all",
    "vpt_deep",
    "adapter",
    "lora_checkpointing",
    "s2a_exact",
    "s2a_4",
    "s2a_4_rebuild",
)


def summary_table(models: tuple[str, ...]) -> str:
    """The variants that matter most: mean accuracy over the data sets, share of full fine-tuning, peak.

    Models without a run are left out.
    """
    models = tuple(model for model in models if accuracies(newest_setting(model)))
    all_found = {model: accuracies(newest_setting(model)) for model in models}
    all_costs = {model: costs(newest_setting(model)) for model in models}
    rows = []
    for name in README_VARIANTS:
        cells = []
        for model in models:
            found, cost = all_found[model], all_costs[model].get(name)
            mean, share = mean_accuracy(found[name], datasets_of(found)), share_of_full(found, name)
            cells += ["–" if mean is None else f"{100 * mean:.1f}", "–" if share is None else f"{100 * share:.1f}"]
            known = cost is not None and "peak_bytes" in cost and mean is not None
            cells.append(f"{cost['peak_bytes'] / cost['batch'] / MB:.2f}" if cost and known else "–")
        if any(cell != "–" for cell in cells):
            rows.append([VARIANTS[name].title, *cells])
    header = ["", *[f"{model}: {what}" for model in models for what in ("accuracy", "% of full", "peak, MB/image")]]
    return markdown_table(header, rows)


def points(model: str) -> list[tuple[str, float, float, float, bool]]:
    """`(title, peak in MB an image, mean accuracy, its spread between seeds, whether it is S2A)` of each variant."""
    records = newest_setting(model)
    found, measured = accuracies(records), costs(records)
    result = []
    for name, variant in VARIANTS.items():
        mean = mean_accuracy(found.get(name, {}), datasets_of(found))
        cost = measured.get(name)
        if mean is None or cost is None:
            continue
        seeds = set.intersection(*[set(values) for values in found[name].values()])
        by_seed = [statistics.mean(values[seed] for values in found[name].values()) for seed in seeds]
        peak = cost["peak_bytes"] / cost["batch"] / MB
        result.append((variant.title, peak, mean, spread(by_seed), variant.method == "s2a"))
    return result
