"""``tools/push_to_hub.py``: weights, configuration and model card as the Hugging Face hub and timm expect them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf
from torch import Tensor

import visattn

from .cards import bibtex
from .checkpoint import ModelInfo, save_weights
from .cli import Parser, UserError
from .config import PLACES
from .conversion import create
from .files import sha256, write_text
from .flags import train_parser
from .front_matter import Results, accuracy, front_matter
from .model_files import read_weights
from .run_folder import RunFolder

REPORTED = Path(__file__).parents[2] / "model_cards" / "reported.json"
FILES = ("model.safetensors", "config.json", "README.md")
AUTHORS = ("license", "origin_url", "tag", "notes", "url", "hf_hub_id", "file")
"""What an architecture's configuration says of its authors' weights."""
PRIVATE = (*PLACES, "data_dir", "output", "experiment", "device", "workers", "log_wandb", "log_tensorboard")
"""Flags about a machine rather than a recipe."""


def push_to_hub_parser() -> Parser:
    """The parser of ``tools/push_to_hub.py``."""
    parser = Parser(prog="push_to_hub.py", description="Make a folder for the Hugging Face hub, and upload it.")
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a run folder, which stands for its best epoch, or weights of ours")
    add("folder", type=Path, metavar="FOLDER", help="where to write model.safetensors, config.json and README.md")
    add("--name", help="what the card calls the model; default: the repository's name, or the folder's")
    add("--license", metavar="ID", help="licence of the weights, by its identifier on the hub, such as apache-2.0")
    add("--overwrite", action="store_true", help="replace what FOLDER holds of the three files")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this repository; the token is huggingface_hub's")
    add("--private", action="store_true", help="with --push: a new repository is not public")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/push_to_hub.py``.

    Raises:
        UserError: No such weights, a folder in use, a name that the hub does not allow, or an upload that fails.
    """
    args = push_to_hub_parser().parse(argv)
    _check(args)
    write_folder(args)
    print(f"wrote {args.folder}: timm.create_model('local-dir:{args.folder}', pretrained=True) after import visattn")
    if args.push:
        print(f"uploaded to {upload(args.folder, args.push, args.private)}")


def _check(args: argparse.Namespace) -> None:
    if args.private and not args.push:
        raise UserError("--private is about a repository; add --push OWNER/NAME")
    if args.push:
        try:
            validate_repo_id(args.push)
        except HFValidationError as error:
            raise UserError(f"--push {args.push}: {error}") from None
    if args.folder.is_dir() and any(args.folder.iterdir()) and not args.overwrite:
        raise UserError(f"{args.folder} is not empty; --overwrite replaces what it holds")


def write_folder(args: argparse.Namespace) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into ``args.folder``."""
    weights, info = read_weights(args.source)
    config = _config(info, weights, args.license)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {args.folder}: {error.strerror}") from None
    file = args.folder / "model.safetensors"
    save_weights(file, weights, info)
    write_text(args.folder / "config.json", json.dumps(config, indent=2) + "\n")
    name = args.name or (args.push or args.folder.resolve().name).rpartition("/")[2]
    settings = run_settings(args.source) if args.source.is_dir() else None
    place = f"hf-hub:{args.push}" if args.push else f"local-dir:{args.folder.name}"
    write_text(args.folder / "README.md", run_card(name, place, info, settings, sha256(file), args.license))


def _config(info: ModelInfo, weights: dict[str, Tensor], licence: str | None) -> dict[str, Any]:
    """What timm needs to build the model again and to prepare its images."""
    model: Any = create(info.architecture, info.num_classes, info.model_args)
    model.load_state_dict(weights)
    known = {k: v for k, v in model.pretrained_cfg.items() if k not in AUTHORS}
    model.pretrained_cfg = known | info.data_config | ({"license": licence} if licence else {})
    labels = {"label_names": info.class_names} if info.class_names else {}
    with TemporaryDirectory() as folder:  # timm writes the weights, too, without a word about what they are
        save_for_hf(model, folder, model_config=labels, model_args=info.model_args or None, safe_serialization=True)
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def run_settings(folder: Path) -> dict[str, Any]:
    """What a run was told that is not the default of ``tools/train.py``; of paths the names of the files alone.

    Raises:
        UserError: The folder has no ``config.yaml``.
    """
    path = RunFolder(folder).config
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    defaults = vars(train_parser().parse([]))
    settings = {k: v for k, v in config.items() if k not in PRIVATE and v != defaults.get(k)}
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in settings.items()}


def run_card(
    name: str, place: str, info: ModelInfo, settings: dict[str, Any] | None, digest: str, licence: str | None
) -> str:
    """The card of a trained model.

    Args:
        name: Its name.
        place: What ``timm.create_model`` takes to load it.
        info: What its weights say of themselves.
        settings: Those of its run, if it has one.
        digest: SHA-256 of the weights.
        licence: Identifier of their licence, if it has one.
    """
    dataset = (settings or {}).get("dataset", "")
    data, split = dataset or "a folder of images", (settings or {}).get("val_split", "validation")
    results: Results = {}
    measured = "Its accuracy is not recorded."
    if "top1" in info.source:
        top1 = round(info.source["top1"], 2)
        results[name] = [accuracy(top1, dataset or "folder", data, split=split)]
        measured = (
            f"Top-1 accuracy {top1:.2f} % on the part of {data} held out as `{split}`, measured by `tools/train.py` at "
            f"the end of\nepoch {info.source['epoch']}. That part chose the epoch: on other data expect less."
        )
    size = "x".join(map(str, info.data_config["input_size"][1:]))
    family = _family(info.architecture)
    classes = ", ".join(info.class_names[:20]) + (", ..." if len(info.class_names) > 20 else "")
    recipe = yaml.safe_dump(settings, sort_keys=False) if settings else ""
    sections = [
        f"# {name}",
        f"`{info.architecture}` with {info.num_classes} classes{f' ({classes})' if classes else ''}, for images of "
        f"{size} pixels.\n\n{measured}",
        f"""## Use

```python
import timm, visattn  # visattn registers the architecture

model = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```""",
        "## Weights\n\n"
        f"`model.safetensors`, SHA-256 `{digest}`, written by visattn {visattn.__version__}. Where they come from:\n\n"
        f"```json\n{json.dumps(info.source)}\n```",
        f"## Training\n\n`tools/train.py` of visattn, with what is not its default:\n\n```yaml\n{recipe}```"
        if recipe
        else "",
        "## Limits\n\n"
        + "\n".join(
            [
                "- Not tested on data other than those above; it answers with one of its classes whatever it sees.",
                *[f"- {limit}" for limit in family.get("limits", [])],
            ]
        ),
        "## Citation\n\n```bibtex\n" + "\n\n".join(map(bibtex, family["citation"])) + "\n```" if family else "",
    ]
    hub_data = [dataset.removeprefix("hfds/")] if dataset.startswith("hfds/") else []
    head = front_matter(licence, hub_data, [info.architecture], results)
    return head + "\n\n".join(section for section in sections if section) + "\n"


def _family(architecture: str) -> dict[str, Any]:
    """The entry of a model's family in ``model_cards/reported.json``; empty for a model of timm's."""
    families = json.loads(REPORTED.read_text(encoding="utf-8")).values()
    return next((family for family in families if architecture in family["models"]), {})


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload the three files to a repository of the hub, which is made if it is not there; return its address.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    api = HfApi(library_name="visattn", library_version=visattn.__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Add model"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:  # no token is a ValueError, no network an OSError
        raise UserError(f"--push {repository}: {error}") from error
    return str(address)
