"""What the outputs of a classifier are called."""

from functools import cache

from timm.data import ImageNetInfo, infer_imagenet_subset

from .checkpoint import ModelInfo


@cache
def _imagenet(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset) if subset else None


def folder_names(info: ModelInfo) -> list[str] | None:
    """Names that class folders have, in the order of the outputs: the checkpoint's, or ImageNet's synsets.

    None if the checkpoint does not say and the number of its classes is not that of a part of ImageNet.
    """
    if info.class_names:
        return info.class_names
    imagenet = _imagenet(info.num_classes)
    return list(imagenet.label_names()) if imagenet else None


def readable_names(info: ModelInfo) -> list[str]:
    """Names for a person, in the order of the outputs: descriptions of synsets, else the checkpoint's, else numbers."""
    names, imagenet = folder_names(info), _imagenet(info.num_classes)
    if names is None:
        return [f"class {i}" for i in range(info.num_classes)]
    if imagenet and set(names) == set(imagenet.label_names()):
        return [imagenet.label_name_to_description(name).split(",")[0] for name in names]
    return names
