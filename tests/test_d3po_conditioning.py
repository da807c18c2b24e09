from __future__ import annotations

import numpy as np
import pytest
import torch

from d3po.families.conditioning import Conditioning


def cond(rows: int = 3) -> Conditioning:
    return Conditioning(
        {
            "text": torch.arange(rows * 8.0).reshape(rows, 2, 4),
            "pooled": torch.arange(rows * 5.0).reshape(rows, 5),
        }
    )


def test_rows_are_taken_from_every_tensor() -> None:
    whole = cond()
    assert len(whole) == 3
    for rows in (slice(1, 3), [2, 0], torch.tensor([1, 1]), np.array([2])):
        part = whole[rows]
        for name, tensor in whole.tensors.items():
            assert torch.equal(part.tensors[name], tensor[rows])


def test_parts_are_joined_and_repeated_in_order() -> None:
    whole = cond()
    again = Conditioning.cat([whole[:1], whole[1:]])
    twice = whole.repeat(2)
    assert len(twice) == 6
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
        assert torch.equal(twice.tensors[name], torch.cat([tensor, tensor]))


def test_one_row_is_spread_and_all_rows_stay() -> None:
    whole = cond()
    assert torch.equal(whole[:1].expand(4).tensors["pooled"][3], whole.tensors["pooled"][0])
    assert torch.equal(whole.expand(3).tensors["text"], whole.tensors["text"])
    with pytest.raises(RuntimeError):
        whole.expand(4)


def test_tensors_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equally many rows.*\(2, 4\).*\(3, 4\)"):
        Conditioning({"text": torch.zeros(2, 4), "pooled": torch.zeros(3, 4)})
