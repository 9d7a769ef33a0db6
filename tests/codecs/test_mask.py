"""One bit per element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_s2a.codecs.mask import decode_mask, encode_mask


@given(numel=st.one_of(st.integers(0, 40), st.sampled_from([1023, 1024, 1025, 3000])), seed=st.integers(0, 20))
def test_mask_survives_in_one_bit_an_element(numel: int, seed: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = encode_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(numel / 1024), 128)
    decoded = decode_mask(packed, numel)
    assert decoded.dtype == torch.bool
    assert torch.equal(decoded, mask)


def test_rows_decode_alone() -> None:
    mask = torch.rand(2500, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(decode_mask(encode_mask(mask)[1:], 2500 - 1024), mask[1024:])


@pytest.mark.parametrize("numel", [1000, 1024, 4096])
@pytest.mark.parametrize("view", ["offset 1", "offset 8", "every second", "one for all", "backwards"])
def test_views_are_packed_as_copies_are(view: str, numel: int) -> None:
    mask = torch.rand(2 * numel + 8, generator=torch.Generator().manual_seed(0)) < 0.5
    views = {
        "offset 1": mask[1 : numel + 1],
        "offset 8": mask[8 : numel + 8],
        "every second": mask[: 2 * numel : 2],
        "one for all": mask[:1].expand(numel),
        "backwards": mask[:numel].flip(0),
    }
    assert torch.equal(encode_mask(views[view]), encode_mask(views[view].clone()))


@pytest.mark.parametrize("numel", [1000, 1024, 4096])
@pytest.mark.parametrize("offset", [0, 1])
def test_compiled_code_packs_alike(numel: int, offset: int) -> None:
    mask = torch.rand(numel + offset, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = torch.compile(lambda m: encode_mask(m[offset:]), fullgraph=True, backend="aot_eager")(mask)
    assert torch.equal(packed, encode_mask(mask[offset:].clone()))
