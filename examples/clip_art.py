"""Clip-art in colour: two Debian packages of drawings, matched into ten classes; a small domain-shift benchmark.

`openclipart-png` (public domain) and `tuxpaint-stamps-default` (GPL-2) sort their drawings into folders. Ten topics
are found in both, so one can train on one collection and test on the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cache import build_once, cache_dir
from PIL import Image

SOURCES = {
    "openclipart": Path("/usr/share/openclipart/png"),
    "tuxpaint": Path("/usr/share/tuxpaint/stamps"),
}
PACKAGES = "openclipart-png tuxpaint-stamps-default"

# class: (folder in openclipart, folder in tuxpaint)
CLASSES = {
    "bird": ("animals/birds", "animals/birds"),
    "bug": ("animals/bugs", "animals/insects"),
    "building": ("buildings", "town/houses"),
    "clothing": ("people/clothing", "clothes"),
    "flower": ("plants/flowers", "plants/flowers"),
    "fruit": ("food/fruit", "food/fruit"),
    "mammal": ("animals/mammals", "animals/mammals"),
    "music": ("recreation/music", "hobbies/music"),
    "roadsign": ("transportation/roadsigns", "town/roadsigns"),
    "vehicle": ("transportation/vehicles", "vehicles"),
}
SIDE = 256
MAX_PIXELS = 100_000_000  # three drawings are larger, up to 623 megapixels: decoding them takes gigabytes


def square_over_white(image: Image.Image, side: int = SIDE) -> Image.Image:
    """`image` in RGB, transparent parts white, shrunk to fit `side` pixels and centred on a white square."""
    image = image.convert("RGBA")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB")


def drawings(folder: Path) -> Iterator[Path]:
    """The PNG files under `folder` in a fixed order, without links, mirrored and flipped variants."""
    for path in sorted(folder.rglob("*.png")):
        if not path.is_symlink() and "_mirror" not in path.stem and "_flip" not in path.stem:
            yield path


def prepare_clip_art(cache: str | os.PathLike[str] | None = None, sources: dict[str, Path] | None = None) -> Path:
    """A folder `<source>/<class>/<number>.png` of small RGB images, prepared once (about a minute) and cached.

    Drawings that look the same after shrinking are kept once. `sources` replaces the two Debian folders.
    Raises `FileNotFoundError` that names the packages when they are not installed.
    """
    places = SOURCES if sources is None else sources
    missing = [str(folder) for folder in places.values() if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} not found: run `apt-get install {PACKAGES}` (290 MB)")
    key = hashlib.sha256(repr((sorted(places.items()), sorted(CLASSES.items()), SIDE)).encode()).hexdigest()[:8]

    def build(folder: Path) -> None:
        print("preparing the clip-art data set (once, about a minute)", flush=True)
        seen: set[bytes] = set()
        for name, folders in CLASSES.items():
            for index, (source, root) in enumerate(places.items()):
                _copy_class(root / folders[index], folder / source / name, seen)

    return build_once(cache_dir(cache) / "datasets" / f"clip-art-{key}", build)


def _copy_class(origin: Path, target: Path, seen: set[bytes]) -> None:
    target.mkdir(parents=True)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the size is checked below
    try:
        for number, path in enumerate(drawings(origin)):
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    continue
                small = square_over_white(image)
            digest = hashlib.sha256(small.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                small.save(target / f"{number:04d}.png")
    finally:
        Image.MAX_IMAGE_PIXELS = limit
