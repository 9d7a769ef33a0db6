"""Batches of one item, from which sensitivities are measured."""

from __future__ import annotations

import torch

from peft_s2a.precision.gradient import single_items


def test_targets_in_a_list_go_with_their_image():
    pixels, masks = torch.randn(3, 3, 8, 8), [torch.ones(k, 8) for k in (1, 2, 3)]
    labels = [{"class_labels": torch.arange(k), "boxes": torch.rand(k, 4)} for k in (1, 2, 3)]
    batch = {"pixel_values": pixels, "labels": labels, "mask_labels": masks, "sizes": [8, 8], "flag": True}
    items = list(single_items(batch, 2))
    assert len(items) == 2
    for index, item in enumerate(items):
        torch.testing.assert_close(item["pixel_values"], pixels[index : index + 1])
        assert [target["boxes"].shape for target in item["labels"]] == [(index + 1, 4)]
        assert item["labels"][0]["boxes"] is labels[index]["boxes"]
        assert [mask.shape for mask in item["mask_labels"]] == [(index + 1, 8)]
        assert item["sizes"] == [8, 8]
        assert item["flag"] is True


def test_a_list_of_arguments_is_not_a_list_of_items():
    first, second = torch.randn(2, 4), torch.randn(2, 5)
    items = list(single_items([first, second], 8))
    assert [[tuple(t.shape) for t in item] for item in items] == [[(1, 4), (1, 5)]] * 2
