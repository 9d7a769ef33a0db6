"""Data sets on tiny made folders."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def save_image(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)


def test_digits_are_split_70_to_30_and_always_alike() -> None:
    from data import load_images

    first, second = load_images("digits"), load_images("digits")
    assert (len(first["train"]), len(first["test"])) == (1257, 540)
    assert first["test"]["label"] == second["test"]["label"]
    assert first["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert np.asarray(first["train"][0]["image"]).shape == (8, 8)


def test_a_folder_with_and_without_test_split(tmp_path: Path) -> None:
    from data import load_images

    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            for index in range(count):
                save_image(tmp_path / "split" / split / label / f"{index}.png", (index, 0, 0))
                save_image(tmp_path / "plain" / label / f"{split}{index}.png", (index, 0, 0))
    parts = load_images(str(tmp_path / "split"))
    assert (len(parts["train"]), len(parts["test"])) == (8, 4)
    parts = load_images(str(tmp_path / "plain"))
    assert (len(parts["train"]), len(parts["test"])) == (8, 4)
    assert parts["train"].features["label"].names == ["cat", "dog"]


def test_columns_that_cannot_be_found_are_named(tmp_path: Path) -> None:
    from data import load_images

    for index in range(3):
        save_image(tmp_path / f"{index}.png", (index, 0, 0))
    with pytest.raises(ValueError, match="--label_column_name"):
        load_images(str(tmp_path))


def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path) -> None:
    from data import load_fashion_mnist

    for stem, count in (("train", 3), ("t10k", 2)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        header = b"\x00\x00\x08\x03" + np.array([count, 28, 28], ">i4").tobytes()
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = b"\x00\x00\x08\x01" + np.array([count], ">i4").tobytes()
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(range(count))))
    parts = load_fashion_mnist(folder=tmp_path)
    assert parts["train"]["label"][:] == [0, 1, 2]
    assert len(parts["test"]) == 2
    assert np.asarray(parts["train"][0]["image"])[0, :3].tolist() == [0, 1, 2]


def test_missing_debian_packages_are_named(tmp_path: Path) -> None:
    from clip_art import prepare_clip_art
    from data import load_fashion_mnist

    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(folder=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install openclipart-png tuxpaint-stamps-default"):
        prepare_clip_art(sources={"openclipart": tmp_path / "none", "tuxpaint": tmp_path / "none"})


def test_clip_art_leaves_out_links_variants_duplicates_and_huge_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clip_art

    monkeypatch.setattr(clip_art, "MAX_PIXELS", 1000)
    sources = {"openclipart": tmp_path / "open", "tuxpaint": tmp_path / "tux"}
    for number, folders in enumerate(clip_art.CLASSES.values()):
        for index, root in enumerate(sources.values()):
            save_image(root / folders[index] / "deep" / "plain.png", (200, 10 * number, 100 * index))
    bird = sources["openclipart"] / "animals/birds"
    save_image(bird / "same.png", (200, 0, 0))  # looks like deep/plain.png
    save_image(bird / "clear.png", (0, 0, 0, 0))
    save_image(bird / "robin_mirror.png", (1, 2, 3))
    save_image(bird / "robin_flip.png", (1, 2, 4))
    save_image(bird / "huge.png", (1, 2, 5), size=(40, 40))
    (bird / "link.png").symlink_to(bird / "clear.png")
    folder = clip_art.prepare_clip_art(sources=sources)
    kept = sorted(path.relative_to(folder).parent.as_posix() for path in folder.rglob("*.png"))
    assert kept.count("openclipart/bird") == 2
    assert len(kept) == 2 * len(clip_art.CLASSES) + 1
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((clip_art.SIDE, clip_art.SIDE), "RGB")
    assert clip_art.prepare_clip_art(sources=sources) == folder


def test_transparent_parts_become_white_and_shape_is_kept() -> None:
    from clip_art import square_over_white

    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    pixels = np.asarray(square_over_white(image, side=20))
    assert pixels.shape == (20, 20, 3)
    assert pixels[0, 0].tolist() == pixels[10, 18].tolist() == [255, 255, 255]
    assert pixels[10, 2].tolist() == [255, 0, 0]


def test_transform_takes_size_and_normalisation_from_the_processor(tiny_vit: Path) -> None:
    from transformers import AutoImageProcessor
    from transforms import batch_transform, collate

    processor = AutoImageProcessor.from_pretrained(tiny_vit)
    image = Image.new("L", (8, 8), 255)
    for size, expected in ((None, 16), (24, 24)):
        example = batch_transform(processor, size)({"image": [image, image], "label": [1, 2]})
        batch = collate([{key: values[index] for key, values in example.items()} for index in range(2)])
        assert batch["pixel_values"].shape == (2, 3, expected, expected)
        assert batch["pixel_values"].unique().tolist() == [1.0]  # (1 - 0.5) / 0.5
        assert batch["labels"].tolist() == [1, 2]
