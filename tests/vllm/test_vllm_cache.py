"""The layouts of vLLM's KV cache, and writing to them."""

from types import SimpleNamespace

import pytest
import torch

from strobe.vllm import cache

BLOCKS, BLOCK, H, D = 5, 16, 2, 24
LAYOUTS = {
    "side by side, NHD": lambda x: x.permute(0, 2, 3, 1, 4).reshape(BLOCKS, BLOCK, H, 2 * D).transpose(1, 2),
    "side by side, HND": lambda x: x.permute(0, 3, 2, 1, 4).reshape(BLOCKS, H, BLOCK, 2 * D),
    "axis 1": lambda x: x.clone(),
    "axis 1, HND": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "axis 0": lambda x: x.transpose(0, 1).contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_each_layout_and_rows_written_to_them(layout):
    filled = torch.randn(BLOCKS, 2, BLOCK, H, D)
    kv_cache = LAYOUTS[layout](filled)
    key_cache, value_cache = cache.pages(kv_cache, D)
    assert torch.equal(key_cache, filled[:, 0]) and torch.equal(value_cache, filled[:, 1])

    slots = torch.tensor([3 * BLOCK + 15, 4 * BLOCK, -1, 0])
    key, value = torch.randn(2, 6, H, D)  # two rows more than slots: those of a padded batch
    cache.write(key, value, key_cache, value_cache, slots, SimpleNamespace())
    for row, slot in ((0, (3, 15)), (1, (4, 0)), (3, (0, 0))):
        filled[slot[0], 0, slot[1]], filled[slot[0], 1, slot[1]] = key[row], value[row]
    again = cache.pages(kv_cache, D)
    assert torch.equal(again[0], filled[:, 0]) and torch.equal(again[1], filled[:, 1])


def test_k_and_v_of_a_cache_with_two_blocks_are_those_of_axis_1():
    kv_cache = torch.randn(2, 2, BLOCK, H, D)
    assert torch.equal(cache.pages(kv_cache, D)[1], kv_cache[:, 1])


@pytest.mark.parametrize("shape", [(BLOCKS, H, BLOCK, 3 * D), (BLOCKS, 3, BLOCK, H, D), (BLOCKS, BLOCK, D), (0,)])
def test_an_unknown_layout_is_an_error(shape):
    with pytest.raises(ValueError, match="known are"):
        cache.pages(torch.zeros(shape), D)
