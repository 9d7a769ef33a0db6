"""Small models of many architectures, each with a batch and the fields of `S2AConfig` that suit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as T
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}


@dataclass(frozen=True)
class Architecture:
    """A tiny model without dropout.

    Args:
        make: makes it with random weights.
        batch: makes the batch, with labels, of two items.
        head: what is trained whole.
        fields: fields of `S2AConfig` beside `modules_to_save`.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    head: tuple[str, ...] = ("classifier",)
    fields: dict[str, Any] = field(default_factory=dict)


def images(size: int = 32, **labels: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2]), **labels}


def segmentation(size: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.randint(0, 3, (2, size, size))}


def tokens(**labels: torch.Tensor) -> dict[str, Any]:
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return {"input_ids": torch.randint(0, 40, (2, 8)), "attention_mask": mask, **labels}


def _swin(**other: Any) -> T.SwinConfig:
    sizes = {"patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "drop_path_rate": 0.0}
    return T.SwinConfig(**({"image_size": 32, "window_size": 2} | sizes | other))


def _resnet(**other: Any) -> T.ResNetConfig:
    return T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], **other)


def _timm() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = T.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=3)
    return T.TimmWrapperForImageClassification(config)


def _segformer() -> nn.Module:
    config = T.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=3,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        **DRY,
    )
    return T.SegformerForSemanticSegmentation(config)


def _upernet() -> nn.Module:
    backbone = _swin(image_size=64, depths=[1, 1], window_size=4, out_features=["stage1", "stage2"])
    config = T.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=3
    )
    return T.UperNetForSemanticSegmentation(config)


def _detr() -> nn.Module:
    config = T.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet(out_features=["stage2"]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
        dropout=0.0,
        auxiliary_loss=False,
    )
    return T.DetrForObjectDetection(config)


def _objects() -> dict[str, Any]:
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    return {"pixel_values": torch.randn(2, 3, 64, 64), "pixel_mask": mask, "labels": [target, target]}


def _clip() -> nn.Module:
    text = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 48}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def _llama() -> nn.Module:
    config = T.LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=1, max_position_embeddings=32)
    return T.LlamaForCausalLM(config)


def _wav2vec2() -> nn.Module:
    names = ("hidden", "attention", "activation", "feat_proj", "final")
    config = T.Wav2Vec2Config(
        **SIZES,
        vocab_size=20,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        apply_spec_augment=False,
        layerdrop=0.0,
        num_labels=3,
        **{f"{name}_dropout": 0.0 for name in names},
    )
    return T.Wav2Vec2ForSequenceClassification(config)


def _two_classes() -> torch.Tensor:
    return torch.tensor([0, 1])


def text_blocks(container: str, length: int) -> dict[str, dict[str, Any]]:
    """Shapes of the two blocks of a model of sequences of one length, for prompts and side branches."""
    shape = {"layout": "tokens", "channels": SIZES["hidden_size"], "out_channels": SIZES["hidden_size"]}
    return {f"{container}.{index}": shape | {"grid": [length]} for index in (0, 1)}


def on_sequences(container: str, length: int) -> dict[str, Any]:
    return {"block_modules": rf".*{container}\.\d+", "block_shapes": text_blocks(container, length)}


ARCHITECTURES: dict[str, Architecture] = {
    "ViT": Architecture(lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3)), images()),
    "DINOv2": Architecture(lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**VISION, num_labels=3)), images()),
    "Swin": Architecture(lambda: T.SwinForImageClassification(_swin(num_labels=3)), images()),
    "ResNet": Architecture(lambda: T.ResNetForImageClassification(_resnet(num_labels=3)), images(64)),
    "ConvNeXt": Architecture(
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, num_labels=3, image_size=32)
        ),
        images(),
    ),
    "timm ViT": Architecture(_timm, images(), ("timm_model.head",)),
    "SegFormer": Architecture(_segformer, lambda: segmentation(64), ("decode_head",), {"image_size": 64}),
    "UperNet + Swin": Architecture(_upernet, lambda: segmentation(64), ("decode_head",)),
    "DETR": Architecture(_detr, _objects, ("class_labels_classifier", "bbox_predictor"), BIAS_ONLY),
    "CLIP, both towers": Architecture(
        _clip, lambda: tokens() | {"pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}, ()
    ),
    "BERT": Architecture(
        lambda: T.BertForSequenceClassification(
            T.BertConfig(**SIZES, **DRY, vocab_size=50, max_position_embeddings=16)
        ),
        lambda: tokens(labels=_two_classes()),
        fields=on_sequences("bert.encoder.layer", 8),
    ),
    "Llama": Architecture(
        _llama, lambda: tokens(labels=torch.randint(0, 40, (2, 8))), (), on_sequences("model.layers", 8)
    ),
    "AST": Architecture(
        lambda: T.ASTForAudioClassification(T.ASTConfig(**SIZES, max_length=64, num_mel_bins=32, num_labels=3)),
        lambda: {"input_values": torch.randn(2, 64, 32), "labels": _two_classes()},
        fields=on_sequences("audio_spectrogram_transformer.layers", 14),
    ),
    "Wav2Vec2": Architecture(
        _wav2vec2,
        lambda: {"input_values": torch.randn(2, 800), "labels": _two_classes()},
        ("projector", "classifier"),
        on_sequences("wav2vec2.encoder.layers", 79),
    ),
}
"""Every architecture of the table."""
