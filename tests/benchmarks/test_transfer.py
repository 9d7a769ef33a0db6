"""The transfer benchmark on a tiny model and an image folder: as a hub's names, both go through as they are."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as ViTImageProcessor

from benchmarks import results, transfer
from benchmarks.fine_tuning import build, fine_tune, make_optimizer, set_training
from benchmarks.image_task import Task, prepare_task
from benchmarks.transfer_plan import VARIANTS
from benchmarks.transfer_tables import accuracy_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 images in two folders, one for each class: dark and bright."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, start in (("dark", 0), ("bright", 128)):
        (folder / label).mkdir()
        for number in range(12):
            pixels = random.integers(start, start + 128, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny ViT and a tiny ResNet with an image processor."""
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    made = {"vit": ViTForImageClassification(vit), "resnet": ResNetForImageClassification(resnet)}
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folders[name])
    return folders


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Path, models: dict[str, Path]
) -> Any:  # a function of the model's name and more arguments, that returns all records
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("PEFT_S2A_CACHE", str(tmp_path / "cache"))

    def call(model: str, *arguments: str) -> list[dict[str, Any]]:
        shared = ["--datasets", str(images), "--seeds", "0", "1", "--epochs", "1", "--batch", "4", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["transfer", "--models", str(models[model]), *shared, *arguments])
        transfer.main()
        return list(results.read("transfer"))

    return call


def task_of(folder: Path, images: Path) -> Task:
    return prepare_task(str(images), str(folder), image_size=16)


def test_runs_are_recorded_and_not_done_again(bench: Any) -> None:
    records = bench("vit", "--methods", "s2a_exact", "s2a_4")
    assert [(r["stage"], r["variant"], r.get("seed")) for r in records] == [
        ("cost", "s2a_exact", None),
        *[("validation", "s2a_exact", 0)] * 3,
        ("test", "s2a_exact", 0),
        ("cost", "s2a_4", None),
        ("test", "s2a_4", 0),
        ("test", "s2a_exact", 1),
        ("test", "s2a_4", 1),
    ]
    cost = records[0]
    assert 0 < cost["trainable_without_head"] < cost["trainable"] < cost["parameters"]
    assert 4 * cost["trainable"] < cost["adapter_bytes"]
    assert records[5]["kept_bytes"] < cost["kept_bytes"] < cost["peak_bytes"]
    rates = {r["learning_rate"] for r in records if r["stage"] == "test"}
    assert len(rates) == 1
    assert rates < set(VARIANTS["s2a_exact"].rates)
    assert all(0 <= r["accuracy"] <= 1 and r["seconds"] > 0 and r["versions"] for r in records if r["stage"] == "test")

    assert bench("vit", "--methods", "s2a_exact", "s2a_4") == records
    more = bench("vit", "--methods", "s2a_exact", "s2a_4", "linear_probe", "--seeds", "0")
    assert [(r["stage"], r["variant"]) for r in more[len(records) :]] == [
        ("cost", "linear_probe"),
        *[("validation", "linear_probe")] * 3,
        ("test", "linear_probe"),
    ]


def test_no_run_is_started_when_the_time_is_over(bench: Any) -> None:
    assert bench("vit", "--methods", "linear_probe", "--time_budget", "-1") == []


def test_a_method_that_does_not_exist_for_a_model_is_a_record_that_says_so(bench: Any, models: Any) -> None:
    records = bench("resnet", "--methods", "vpt_deep", "linear_probe", "--seeds", "0")
    assert [r["variant"] for r in records] == [*["linear_probe"] * 4, "vpt_deep", "linear_probe"]
    assert "plain sequence of blocks" in records[4]["not_applicable"]
    table = accuracy_table(str(models["resnet"]))
    assert "| VPT-deep | does not exist |" in table
    assert "| linear probe |" in table


def test_an_unknown_method_in_the_rates_is_refused(bench: Any) -> None:
    with pytest.raises(SystemExit, match="--rates has no method lora_xy"):
        bench("vit", "--rates", '{"lora_xy": [1]}')


def test_validation_and_training_images_are_apart_and_the_same_every_time(models: Any, images: Path) -> None:
    task = task_of(models["vit"], images)
    train, validation = transfer.split(task)
    assert sorted([*train.indices, *validation.indices]) == list(range(len(task.train)))
    assert len(validation) == round(0.2 * len(task.train))
    assert transfer.split(task)[1].indices == validation.indices


def test_a_run_is_reproducible_and_the_seed_changes_it(models: Any, images: Path) -> None:
    task = task_of(models["vit"], images)

    def losses(seed: int) -> tuple[float, float]:
        run = fine_tune(task, task.train, task.test, VARIANTS["s2a_4"], 1e-2, seed, 2, 4, CPU)
        return run["loss"], run["train_loss"]

    assert losses(0) == losses(0) != losses(1)


def test_training_learns_and_reports_progress(models: Any, images: Path) -> None:
    task, shares = task_of(models["vit"], images), []
    run = fine_tune(task, task.train, task.test, VARIANTS["s2a_exact"], 3e-3, 0, 12, 4, CPU, shares.append)
    assert run["accuracy"] == 1.0
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("name", "moves"), [("full", True), ("bias_only", False), ("adapter", False), ("s2a_4", False)]
)
def test_running_statistics_move_in_full_fine_tuning_alone(name: str, moves: bool, models: Any, images: Path) -> None:
    task = task_of(models["resnet"], images)
    model, _ = build(task, VARIANTS[name], 0, CPU)
    before = {path: value.clone() for path, value in model.named_buffers() if "running_mean" in path}
    set_training(model, VARIANTS[name])
    model(pixel_values=task.train.tensors[0][:4])
    after = dict(model.named_buffers())
    assert before
    assert any(not torch.equal(value, after[path]) for path, value in before.items()) == moves


def test_lora_fa_moves_b_and_the_head_alone(models: Any, images: Path) -> None:
    task = task_of(models["vit"], images)
    model, _ = build(task, VARIANTS["lora_fa"], 0, CPU)
    optimizer = make_optimizer(model, VARIANTS["lora_fa"], 1e-2)
    before = {path: value.clone() for path, value in model.named_parameters()}
    pixels, labels = task.train[:4]
    model(pixel_values=pixels, labels=labels).loss.backward()
    optimizer.step()
    moved = {path for path, value in model.named_parameters() if not torch.equal(value, before[path])}
    assert moved == {path for path in before if "lora_B" in path or "modules_to_save" in path}
