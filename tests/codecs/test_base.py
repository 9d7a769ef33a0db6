"""The codec that keeps the numbers themselves."""

from __future__ import annotations

import pytest
import torch

from peft_s2a.codecs.base import IdentityCodec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identity_returns_the_values(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1.5, float("inf"), float("nan")], dtype=dtype)
    kept = IdentityCodec().encode(values)
    torch.testing.assert_close(IdentityCodec().decode(kept, 4, dtype), values, rtol=0, atol=0, equal_nan=True)


def test_codecs_are_values() -> None:
    assert IdentityCodec() == IdentityCodec()
    assert len({IdentityCodec(), IdentityCodec()}) == 1
