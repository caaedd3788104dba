"""Gradients of a model beside those that a golden case recorded."""

import pytest
from goldens.golden import make_input, max_error

TOLERANCE = 1e-9


def check_gradients(case, out, x, model, names):
    """Backward from the case's cotangent: the input's gradient, and the norm of every parameter's.

    Args:
        case: The golden case.
        out: What the model made of `x`.
        x: Its input, which requires a gradient.
        model: The model.
        names: The recorded name of each of its parameters.
    """
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE
    expected = dict(case["param_grad_norms"])
    for ours, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert norm == pytest.approx(expected.pop(names[ours]), rel=TOLERANCE, abs=1e-12), ours
    assert not expected, "recorded parameters without a counterpart"
