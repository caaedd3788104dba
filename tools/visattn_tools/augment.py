"""Training views of a picture: timm's transforms, several of them for JSD, or an albumentations pipeline."""

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from timm.data import auto_augment, create_transform

from .cli import UserError, nearest

Transform = Callable[[Image.Image], Any]
_EXPECTED = "expected transforms: a list of one name with its arguments each"


def _posterize(picture: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's, whose random magnitudes may leave no bit: Pillow made that black, from version 13 on it refuses."""
    if bits_to_keep < 1:
        return Image.new(picture.mode, picture.size)
    return auto_augment.posterize(picture, bits_to_keep)


for _name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[_name] = _posterize


def train_transform(args: argparse.Namespace, data_config: dict[str, Any]) -> Transform:
    """The transform that the flags ask for; its draws come from the global generators.

    Raises:
        UserError: ``--aug-config`` is no pipeline that gives images of the model's size.
    """
    size = tuple(data_config["input_size"])
    if args.aug == "albumentations":
        return Albumentations(Path(args.aug_config), size[1:])
    transform: Any = create_transform(
        size,
        is_training=True,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        separate=bool(args.aug_splits),
        **test_options(data_config),
    )
    return Views(transform, args.aug_splits) if args.aug_splits else transform


def test_options(data_config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of timm's ``create_transform`` that training and testing share."""
    keys = ("mean", "std", "crop_pct", "crop_mode")
    return {key: data_config[key] for key in keys} | {"use_prefetcher": True}


class Views:
    """Several views of one crop, the first one without colour augmentation: what ``--jsd-loss`` compares.

    Args:
        stages: timm's: crop, augmentation, conversion.
        count: How many views.
    """

    def __init__(self, stages: tuple[Transform, Transform, Transform], count: int) -> None:
        self.crop, self.augment, self.finish = stages
        self.count = count

    def __call__(self, picture: Image.Image) -> tuple[Any, ...]:
        crop = self.crop(picture)
        return tuple(self.finish(crop if view == 0 else self.augment(crop)) for view in range(self.count))


class Albumentations:
    """A pipeline of albumentations. Its draws follow from numpy's global generator, which the caller seeds.

    The file holds ``transforms:``, a list of one name with its arguments each; transforms of transforms nest.
    ``height``, ``width`` and ``size`` as an argument's value stand for the model's. The result has to be an RGB image
    of the model's size, in 0 to 255: the loader normalises.

    Args:
        path: The YAML file.
        size: (height, width) of the model's input.

    Raises:
        UserError: albumentations is not installed, or the file is no such pipeline.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for a newer one
        try:
            import albumentations
            import cv2
        except ImportError as error:
            raise UserError(f"--aug albumentations needs a package: pip install {error.name}") from None
        cv2.setNumThreads(0)  # the loader's processes share the cores already
        self.path, self.library = path, albumentations
        self.values = {"height": size[0], "width": size[1], "size": list(size)}
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"--aug-config {path}: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(recipe, dict) or list(recipe) != ["transforms"]:
            raise UserError(f"--aug-config {path}: {_EXPECTED}")
        self.pipeline = albumentations.Compose(self._transforms(recipe["transforms"]))
        try:
            result = self(Image.new("RGB", (size[1] + 31, size[0] + 57), (90, 120, 150)))
        except Exception as error:  # a transform's own complaint about its input
            raise UserError(f"--aug-config {path} fails on an RGB picture: {error}") from error
        if result.shape != (3, *size) or result.dtype != np.uint8:
            raise UserError(
                f"--aug-config {path} gives {result.dtype} images of {'x'.join(map(str, result.shape[1:]))} px; "
                f"expected uint8 of {size[0]}x{size[1]}: crop to size, and leave normalisation to the loader"
            )

    def _transforms(self, found: Any) -> list[Any]:
        if not isinstance(found, list):
            raise UserError(f"--aug-config {self.path}: {found!r} is no list; {_EXPECTED}")
        return [self._transform(entry) for entry in found]

    def _transform(self, entry: Any) -> Any:
        entry = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"--aug-config {self.path}: {entry!r}; {_EXPECTED}")
        ((name, arguments),) = entry.items()
        kind = getattr(self.library, str(name), None)
        if not (isinstance(kind, type) and hasattr(kind, "to_dict")):
            known = [key for key, value in vars(self.library).items() if isinstance(value, type)]
            raise UserError(f"--aug-config {self.path}: albumentations has no {name}{nearest(str(name), known)}")
        if not isinstance(arguments, dict | None):
            raise UserError(f"--aug-config {self.path}: {name}: {arguments!r} must be arguments with values")
        arguments = {key: self._value(value) for key, value in (arguments or {}).items()}
        if "transforms" in arguments:
            arguments["transforms"] = self._transforms(arguments["transforms"])
        accepted = set(inspect.signature(kind).parameters) - {"kwargs"}
        for key in arguments:
            if key not in accepted:  # albumentations itself only warns
                raise UserError(f"--aug-config {self.path}: {name} has no argument {key!r}{nearest(key, accepted)}")
        try:
            return kind(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"--aug-config {self.path}: {name}: {error}") from error

    def _value(self, value: Any) -> Any:
        return self.values.get(value, value) if isinstance(value, str) else value

    def __call__(self, picture: Image.Image) -> np.ndarray:
        self.pipeline.set_random_seed(int(np.random.randint(2**31)))  # noqa: NPY002  seeded per picture and epoch
        return np.ascontiguousarray(self.pipeline(image=np.asarray(picture))["image"].transpose(2, 0, 1))

    def text(self) -> str:
        """The pipeline with all its arguments, in albumentations' own form, as YAML."""
        form: Any = self.library.to_dict(self.pipeline)
        return yaml.safe_dump(_plain(form), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
