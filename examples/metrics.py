"""Top-1 accuracy as an `evaluate.Metric` that lives here, so that no metric script is fetched from the hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as `evaluate.load("accuracy")` computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class numbers",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What `transformers.Trainer` calls: accuracy of the arg-max class."""
    metric = Accuracy(keep_in_memory=True)
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    result = metric.compute(predictions=np.argmax(logits, axis=1), references=prediction.label_ids)
    assert result is not None  # only other processes of a distributed run get None
    return dict(result)
