"""The golden protocol is frozen: these numbers were drawn when the cases were recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from goldens.golden import digest, fill_value, load_case, make_input, max_error, reference_state_dict


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("blocks.0.norm.weight", (2,), [1.0581842591360051, 1.13953317822395]),
        ("blocks.0.norm.bias", (2,), [0.04550995689879686, 0.10297003911295469]),
        ("bn.running_mean", (2,), [0.11585340587381816, 0.06459941300798405]),
        ("bn.running_var", (2,), [1.1326854643272009, 1.1509660946232911]),
        ("blocks.0.attn.qkv.weight", (2, 2), [0.7800897992164525, 0.8751777921978443]),
        ("stem.weight", (1, 3, 2, 1), [-0.023031766087463098, -0.4879906881296731]),
        ("scale", (), [0.975185810511112]),
    ],
)
def test_fill_value(key: str, shape: tuple[int, ...], expected: list[float]) -> None:
    value = fill_value(key, shape)
    assert (value.dtype, value.shape) == (np.float64, shape)
    assert value.ravel()[:2].tolist() == expected


def test_make_input() -> None:
    assert make_input((2, 2)).tolist() == [
        [0.14904862002754748, -0.39147441274716777],
        [1.5935776306782905, -0.40422825803593615],
    ]
    assert make_input((1, 2), "cotangent").tolist() == [[-0.5047155835961261, -0.4219642524699316]]


def test_digest() -> None:
    assert digest(torch.arange(100.0) - 7, n=4) == {
        "shape": [100],
        "norm": pytest.approx(513.7606446585803, rel=1e-15),
        "mean": 42.5,
        "index": [15, 28, 40, 56],
        "values": [8.0, 21.0, 33.0, 49.0],
    }


def test_reference_state_dict(tmp_path) -> None:
    path = tmp_path / "case.json"
    path.write_text(
        '{"state_dict": {"a.weight": [2, 2], "a.gamma": [2], "a.index": [3], "a.table": [4]},'
        ' "non_float_buffers": ["a.index"], "not_filled": ["a.table"],'
        ' "post_fill": {"leaf_names": ["gamma"], "multiply": 0.5}}'
    )
    state = reference_state_dict(load_case(path))
    assert list(state) == ["a.weight", "a.gamma"]
    assert all(tensor.dtype == torch.float64 for tensor in state.values())
    assert state["a.weight"].tolist() == fill_value("a.weight", (2, 2)).tolist()
    assert state["a.gamma"].tolist() == (fill_value("a.gamma", (2,)) * 0.5).tolist()


def test_max_error() -> None:
    tensor = make_input((4, 5))
    expected = digest(tensor)
    assert max_error(tensor, expected) == 0
    assert max_error(tensor * (1 + 1e-6), expected) == pytest.approx(1e-6, rel=2)
    moved = tensor.clone()
    moved.view(-1)[expected["index"][3]] += 1
    assert max_error(moved, expected) > 0.5
    assert max_error(torch.zeros(2), digest(torch.zeros(2))) == 0
    with pytest.raises(AssertionError, match=r"shape \[5, 4\] != recorded \[4, 5\]"):
        max_error(tensor.reshape(5, 4), expected)
