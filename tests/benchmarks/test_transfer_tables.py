"""What is made of the transfer benchmark's records."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.transfer_tables import (
    accuracies,
    accuracy_table,
    earlier_table,
    newest_setting,
    points,
    rates_table,
    share_of_full,
)

MODEL = "some/model"
SETTING = {
    "model": MODEL,
    "image_size": 32,
    "epochs": 1.0,
    "batch": 10,
    "max_train_samples": 8,
    "max_test_samples": None,
}


def run(variant: str, dataset: str, seed: int, accuracy: float, rate: float = 1e-3, **changes: Any) -> dict[str, Any]:
    record = {"stage": "test", "variant": variant, "dataset": dataset, "seed": seed, "learning_rate": rate}
    return SETTING | record | {"accuracy": accuracy} | changes


def cost(variant: str, **values: Any) -> dict[str, Any]:
    sizes = {"parameters": 1000, "trainable": 30, "trainable_without_head": 10, "adapter_bytes": 2_000_000}
    measured = sizes | {"kept_bytes": 30_000_000, "peak_bytes": 40_000_000}
    return SETTING | {"stage": "cost", "variant": variant, "dataset": "digits"} | (values or measured)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def write(*records: dict[str, Any]) -> None:
        (tmp_path / "transfer.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    return write


def test_a_row_has_mean_spread_share_and_costs(written: Any) -> None:
    written(
        cost("full"),
        cost("s2a_4"),
        *[run("full", name, seed, 0.8) for name in ("digits", "clip-art") for seed in range(3)],
        *[run("s2a_4", "digits", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))],
        *[run("s2a_4", "clip-art", seed, 0.8) for seed in range(3)],
    )
    lines = accuracy_table(MODEL).splitlines()
    assert lines[0].startswith("| some/model | digits | clip-art | mean | % of full |")
    assert lines[3] == "| S2A, 4 bits | 60.0 ± 10.0 | 80.0 ± 0.0 | 70.0 | 87.5 | 1.00 (3.00) | 2.00 | 3.00 | 4.00 |"


def test_seeds_that_are_missing_are_said_and_shares_are_of_common_runs(written: Any) -> None:
    written(
        cost("full"),
        cost("s2a_4"),
        run("full", "digits", 0, 0.5),
        run("full", "digits", 1, 1.0),
        run("s2a_4", "digits", 0, 0.4),
    )
    assert "| 40.0 (1) |" in accuracy_table(MODEL)
    assert share_of_full(accuracies(newest_setting(MODEL)), "s2a_4") == pytest.approx(0.8)


def test_no_mean_without_every_data_set(written: Any) -> None:
    written(
        cost("full"),
        cost("s2a_4"),
        *[run("full", n, 0, 0.5) for n in ("digits", "clip-art")],
        run("s2a_4", "digits", 0, 1),
    )
    row = accuracy_table(MODEL).splitlines()[3]
    assert row.startswith("| S2A, 4 bits | 100.0 (1) | – | – | – |")
    assert [point[0] for point in points(MODEL)] == ["full fine-tuning"]


def test_only_the_last_setting_counts(written: Any) -> None:
    written(cost("full"), run("full", "clip-art", 0, 0.1, epochs=9.0), run("full", "digits", 0, 0.7))
    assert accuracies(newest_setting(MODEL)) == {"full": {"digits": {0: 0.7}}}


def test_earlier_settings_have_a_table_of_their_own(written: Any) -> None:
    earlier = [run("full", "digits", 0, 0.8, epochs=9.0), run("s2a_4", "digits", 0, 0.4, epochs=9.0)]
    written(*earlier, cost("full"), run("full", "digits", 0, 0.7))
    lines = earlier_table(MODEL).splitlines()
    assert lines[2:] == [
        "| full fine-tuning, 8 images, 9 epochs, batch 10 | 80.0 (1) | 100.0 |",
        "| S2A, 4 bits, 8 images, 9 epochs, batch 10 | 40.0 (1) | 50.0 |",
    ]


def test_a_rate_at_the_end_of_its_grid_has_a_star(written: Any) -> None:
    written(run("s2a_exact", "digits", 0, 0.5, 1e-3), run("s2a_exact", "clip-art", 0, 0.5, 3e-3))
    assert "| S2A, exact | 0.0003, 0.001, 0.003 | 0.001 | 0.003* |" in rates_table(MODEL)


def test_a_point_is_peak_mean_and_spread_of_the_seeds_means(written: Any) -> None:
    written(
        cost("s2a_4"),
        *[run("s2a_4", "digits", seed, value) for seed, value in enumerate((0.5, 0.7))],
        *[run("s2a_4", "clip-art", seed, value) for seed, value in enumerate((0.9, 0.7))],
    )
    assert points(MODEL) == [("S2A, 4 bits", 4.0, pytest.approx(0.7), pytest.approx(0.0), True)]
