"""Model cards, one a family: what a reader and the Hugging Face hub need to know."""

from typing import Any

import timm

import visattn  # noqa: F401  registers the models


def card(key: str, family: dict[str, Any], measured: dict[str, Any], table: str) -> str:
    """The model card of one family, in the layout of the Hugging Face hub.

    Args:
        key: Its name in ``model_cards/reported.json``.
        family: One entry of ``model_cards/reported.json``.
        measured: Figures of our own, by model.
        table: Markdown table of the family's models.
    """
    name = next(iter(family["models"]))
    first = measured[name]["count"]
    backbone: Any = timm.create_model(name, features_only=True, device="meta")
    strides = ", ".join(map(str, backbone.feature_info.reduction()))
    limits = "\n".join(f"- {limit}" for limit in family["limits"])
    code = "none published"
    if family["code"]:
        code = f"{family['code']} at `{family['commit']}`, {family['license']} licence"
    points = "".join(_compute_points(n, measured[n]) for n in family["models"] if "compute_points" in measured[n])
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, visattn]
license: {family["license"].lower()}
datasets: [imagenet-1k]
---
# {family["title"]}

{family["idea"]}

- Paper: {family["paper"]}, https://arxiv.org/abs/{family["arxiv"]}
- Authors' code: {code}

## Models

{table}

Parameters and GMACs are measured by `tools/benchmark.py` (torch {first["torch"]}, {first["date"]};
GMACs are half the FLOPs of convolutions and matrix products for one image). Top-1 is ImageNet-1k validation accuracy as
reported; we have not re-measured it.
{points}
## Use

```python
import timm, visattn

model = timm.create_model("{name}", num_classes=10)
features = timm.create_model("{name}", features_only=True)  # maps of stride {strides}
```

## Weights

{family["weights"]}

## Limits

{limits}
"""


def _compute_points(name: str, measured: dict[str, Any]) -> str:
    """What ``tools/compute_points.py`` measured of a model, as a section of its card."""
    figures = measured["compute_points"]
    rows = "\n".join(
        f"| {f['compressed'].replace('peer', figures['peer'])} | {f['gmacs']:.2f} | {f['images_per_second']:.2f} "
        f"| {f['ratio_to_peer']:.2f} | {f['weights_mib']:.0f} | {f['activations_mib']:.0f} |"
        for f in figures["points"]
    )
    return f"""
### {name} by compressed grid

| compressed grid | GMACs | images/s | times {figures["peer"]} | weights (MiB) | activations (MiB) |
|---|---:|---:|---:|---:|---:|
{rows}

`python tools/compute_points.py {name} -b {figures["batch_size"]} --rounds {figures["rounds"]}` on {figures["date"]}:
{figures["hardware"]}, torch with {figures["threads"]} of them, a load of {figures["load_before"]} by other work;
{figures["img_size"]} px, {figures["dtype"]}, torch {figures["torch"]}. All take turns in every round, so that the load
meets all; the speeds are medians, the ratio is the median of those within a round. Activations are the most that torch
holds at a time beside weights and images.
"""
