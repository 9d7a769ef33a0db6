"""Which runs the transfer benchmark makes, and the learning rate each of them takes."""

from typing import Any

import pytest

from benchmarks.transfer_plan import SETTING, TIERS, VARIANTS, best_rate, jobs, key, rates_of, searched

MODELS, DATASETS = ("first", "second"), ("easy", "hard")


def settings() -> list[dict[str, Any]]:
    rest = {"image_size": 56, "epochs": 2.0, "batch": 16, "max_train_samples": 8, "max_test_samples": None}
    return [{"model": model, "dataset": dataset, **rest} for model in MODELS for dataset in DATASETS]


def found(
    rate: float, accuracy: float, loss: float = 1.0, variant: str = "s2a_exact", **changes: Any
) -> dict[str, Any]:
    record = {"stage": "validation", "variant": variant, "seed": 0, "learning_rate": rate}
    return {**settings()[0], **record, "accuracy": accuracy, "loss": loss} | changes


def test_every_variant_is_in_one_tier() -> None:
    assert sorted(name for tier in TIERS for name in tier) == sorted(VARIANTS)


def test_every_variant_has_rates_or_takes_those_of_one_that_has() -> None:
    for name, variant in VARIANTS.items():
        assert bool(variant.rates) != bool(variant.rate_of)
        for source in searched(name):
            assert len(rates_of(source, "first", {})) == 3


def test_an_interruption_leaves_whole_tiers_and_all_data_sets() -> None:
    planned = list(jobs(settings(), ["full", "linear_probe"], [0, 1], {}))
    order = [(job["variant"], job["model"], job["seed"], job["dataset"]) for job in planned if job["stage"] == "test"]
    assert order == [
        (variant, model, seed, dataset)
        for variant in ("full", "linear_probe")
        for model in MODELS
        for seed in (0, 1)
        for dataset in DATASETS
    ]


def test_a_search_comes_before_the_first_test_run_and_once() -> None:
    planned = list(jobs(settings()[:1], ["s2a_exact", "s2a_4"], [3, 4], {}))
    stages = [(job["stage"], job["variant"], job["seed"]) for job in planned]
    tests = [("test", name, seed) for seed in (3, 4) for name in ("s2a_exact", "s2a_4")]
    assert stages == [("validation", "s2a_exact", 3)] * 3 + tests
    assert len({key(job) for job in planned}) == len(planned)


def test_a_variant_alone_still_has_the_search_of_the_one_it_follows() -> None:
    planned = list(jobs(settings()[:1], ["s2a_4"], [0], {}))
    assert [job["variant"] for job in planned] == ["s2a_exact"] * 3 + ["s2a_4"]


def test_rates_of_the_command_line_win() -> None:
    planned = list(jobs(settings()[:1], ["full"], [0], {"full": (1.0, 2.0)}))
    assert [job.get("learning_rate") for job in planned] == [1.0, 2.0, None]


def test_a_test_run_is_the_same_whatever_rate_it_took() -> None:
    job = {**settings()[0], "stage": "test", "variant": "full", "seed": 0}
    assert key(job) == key(job | {"learning_rate": 1e-3, "accuracy": 0.5})
    assert key(found(1e-3, 0.5)) != key(found(3e-3, 0.5))


@pytest.mark.parametrize("name", SETTING)
def test_another_setting_is_another_run(name: str) -> None:
    job = {**settings()[0], "stage": "test", "variant": "full", "seed": 0}
    assert key(job) != key(job | {name: "other"})


def test_the_best_rate_is_that_of_the_setting_and_the_variant() -> None:
    records = [
        found(1e-3, 0.5),
        found(3e-3, 0.6),
        found(1e-2, 0.9, dataset="hard"),
        found(1e-2, 0.9, epochs=9.0),
        found(1e-2, 0.9, variant="full"),
        found(1e-2, 0.9, stage="test"),
    ]
    job = {**settings()[0], "stage": "test", "variant": "s2a_4", "seed": 2}
    assert best_rate(records, job) == 3e-3


def test_a_tie_goes_to_the_lower_loss_and_then_to_the_lower_rate() -> None:
    job = {**settings()[0], "stage": "test", "variant": "s2a_exact", "seed": 0}
    assert best_rate([found(1e-3, 0.5, 2.0), found(3e-3, 0.5, 1.0)], job) == 3e-3
    assert best_rate([found(3e-3, 0.5), found(1e-3, 0.5)], job) == 1e-3


def test_the_second_source_counts_where_the_first_does_not_exist() -> None:
    job = {**settings()[0], "stage": "test", "variant": "lora_checkpointing", "seed": 0}
    on_all = found(1e-2, 0.9, variant="lora_all")
    assert best_rate([on_all], job) == 1e-2
    assert best_rate([on_all, found(1e-3, 0.1, variant="lora_qv")], job) == 1e-3
    with pytest.raises(ValueError, match="no learning rate was searched for lora_checkpointing"):
        best_rate([], job)
