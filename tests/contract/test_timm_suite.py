"""timm's own ``tests/test_models.py``, unmodified, on the models that are small enough for every run of the tests.

These are the ``test_*`` variants, which hold all branches of their family, and the smallest real variant per family.
``run_all.py`` beside this file does the same for every variant; ``RESULTS.md`` holds what it found.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from runner import own_models, run_model

import visattn  # noqa: F401  registers the models

SMALLEST_REAL = [
    "biformer_mini",
    "davit_t",
    "dependencyvit_mini",
    "halonet_h0_256",
    "lookupvit_mini",
    "nat_m",
    "ninformer_cifar",
    "sparsifiner_t16",
    "van_b0",
]

pytestmark = pytest.mark.contract

MODELS = own_models()
SELECTION = sorted(name for name in MODELS if name.startswith("test_")) + SMALLEST_REAL


def test_every_family_is_in_the_selection() -> None:
    """A family without a ``test_*`` variant or without its smallest real one would go untested in silence."""
    family_of = {name: timm.model_entrypoint(name).__module__ for name in MODELS}
    families = set(family_of.values())
    assert families, "importing visattn registered no model"
    tiny = {family_of[name] for name in SELECTION if name.startswith("test_")}
    real = {family_of.get(name) for name in SMALLEST_REAL}
    assert families - tiny == set(), "families that register no test_* variant"
    assert families - real == set(), "families without an entry in SMALLEST_REAL"


@pytest.mark.parametrize("name", list(MODELS))
def test_a_feature_map_declares_its_size(name: str) -> None:
    """A cfg without ``pool_size`` means token features, for which timm asks less: a 4-stage model must not say so."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        features = model.forward_features(torch.randn(1, *model.default_cfg["input_size"]))
    assert (features.ndim == 4) == (model.default_cfg.get("pool_size") is not None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", SELECTION)
def test_timm_suite(name: str, record_property: Callable[[str, object], None]) -> None:
    """Every test of timm that is about a model runs on ours, and passes."""
    assert name in MODELS, f"{name} is not registered by visattn"
    result = run_model(name, timeout=1200)
    record_property("summary", f"timm's tests on {name}: {result.summary}")
    problems = result.problems(MODELS[name])
    assert not problems, "\n".join([*problems, "", "the end of timm's own report:", result.output])
