"""DINOv2-small, saliency-tuned: from the ONNX graph of a saliency detector to a `transformers.Dinov2Model`.

The graph holds a ViT-S/14 backbone under its Hugging Face names and a small decoder, which is dropped. Matrices lost
their names in the export: each is the operand of the MatMul whose output is added to a named bias. The mask token is
not in the graph; it stays zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

_PREFIX = "backbone."
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


def dinov2_small_config() -> Dinov2Config:
    """The configuration of DINOv2-small (ViT-S/14, pretrained at 518 px)."""
    return Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)


def read_state(graph_bytes: bytes) -> dict[str, torch.Tensor]:
    """The backbone's weights in the graph, under the names that `Dinov2Model` gives them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(graph_bytes).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in arrays.items() if name.startswith(_PREFIX)}
    named |= _matrices(graph, arrays)
    named |= _position_embeddings(arrays)
    state = {_rename(name): torch.from_numpy(np.array(array)) for name, array in named.items()}
    state["embeddings.mask_token"] = torch.zeros_like(state["embeddings.cls_token"][0])
    return state


def _matrices(graph: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`{name}.weight` of every `x @ W + {name}.bias`, transposed to PyTorch's (out, in)."""
    producer = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(_PREFIX) and name.endswith(".bias")), None)
        product = next((producer[name] for name in node.input if name in producer), None)
        if bias is None or product is None or product.op_type != "MatMul":
            continue
        matrix = next(name for name in product.input if name in arrays)
        found[bias.removesuffix("bias") + "weight"] = arrays[matrix].T
    return found


def _position_embeddings(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The two unnamed parts (class token and patch grid), joined."""
    parts = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    parts.sort(key=lambda part: part.shape[1])
    return {_PREFIX + "embeddings.position_embeddings": np.concatenate(parts, axis=1)}


def _rename(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def convert_dinov2(graph_bytes: bytes, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` into `folder`.

    Raises `RuntimeError` (from `load_state_dict`) when a weight is missing, unexpected or of another shape.
    """
    model = Dinov2Model(dinov2_small_config())
    model.load_state_dict(read_state(graph_bytes), strict=True)
    save_dinov2(model, folder)


def save_dinov2(model: Dinov2Model, folder: Path) -> None:
    """Write the model and the image processor that it was trained with."""
    model.save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    processor.save_pretrained(folder)


def max_difference_to_onnx(graph_bytes: bytes, folder: Path) -> float:
    """Largest absolute difference of the last hidden state to onnxruntime's, for two random 224-px images."""
    import onnx
    import onnxruntime

    graph = onnx.load_model_from_string(graph_bytes)
    last = next(node for node in graph.graph.node if _PREFIX + "layernorm.bias" in node.input).output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([last], {session.get_inputs()[0].name: pixels.numpy()})
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
    return float((hidden - torch.from_numpy(expected)).abs().max())
