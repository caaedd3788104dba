"""The YAML at the head of a model card: what the Hugging Face hub reads of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

Results = dict[str, list[EvalResult]]
"""Results by the name of their model."""


def accuracy(
    value: float, dataset: str, name: str, source: str | None = None, url: str | None = None, split: str = "validation"
) -> EvalResult:
    """A top-1 accuracy in %, not verified by the hub.

    Args:
        value: The accuracy.
        dataset: Its id on the hub, or another short name.
        name: What people call the data.
        source: Who says so, if it is not the card itself.
        url: Where they say it.
        split: The part of the data.
    """
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=name,
        dataset_split=split,
        metric_type="accuracy",
        metric_name="top-1 accuracy (%)",
        metric_value=value,
        verified=False,
        source_name=source,
        source_url=url,
    )


def reported_results(family: dict[str, Any]) -> Results:
    """The ImageNet accuracies that a family's entry in ``model_cards/reported.json`` cites, by model."""
    results: Results = {}
    for name, facts in family["models"].items():
        if "top1" in facts:
            source, url = facts.get("source", family["source"]), facts.get("source_url", family["source_url"])
            results[name] = [accuracy(facts["top1"], "imagenet-1k", "ImageNet-1k", f"reported: {source}", url)]
    return results


def front_matter(licence: str | None, datasets: Sequence[str], tags: Iterable[str], results: Results) -> str:
    """The block of YAML between its two lines of dashes.

    Args:
        licence: Identifier of the licence of weights and code, if they have one.
        datasets: Data that the figures, or the weights, are of, by their ids on the hub.
        tags: Words to find the model by, besides the libraries'.
        results: For the ``model-index``.
    """
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=licence.lower() if licence else None,
        tags=["image-classification", "timm", "visattn", *tags],
        datasets=list(datasets) or None,
    ).to_dict()
    index = [entry for name, figures in results.items() for entry in eval_results_to_model_index(name, figures)]
    if index:
        data["model-index"] = index
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"
