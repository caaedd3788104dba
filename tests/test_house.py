"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from source_tree import imports, is_inside, modules, scripts

import visattn

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400

# From the bottom up: a module may import what lies in its own layer or below, never what lies above.
LAYERS = ["visattn_kernels", "visattn.layers", "visattn.models", "visattn", "visattn_tools"]
KERNELS_NEVER_IMPORT = ("timm", "torchvision")


def _layer(module: str) -> int | None:
    """Index of the most specific layer that `module` lies in; None for foreign modules."""
    return max(
        (i for i, name in enumerate(LAYERS) if is_inside(module, name)), key=lambda i: len(LAYERS[i]), default=None
    )


def _is_family(module: str) -> bool:
    return bool(re.fullmatch(r"visattn\.models\.[a-z]\w*", module))


def direction_violations(root: Path) -> list[str]:
    """Every import below `root` that points against the arrows kernels <- layers <- models <- tools."""
    known = modules(root)
    found = []
    for module, path in known.items():
        own = _layer(module)
        assert own is not None
        for line, target in imports(path, module, known):
            layer = _layer(target)
            where = f"{path.relative_to(root)}:{line}: {module} imports {target}"
            if layer is not None and layer > own:
                found.append(f"{where}, which lies above it")
            elif is_inside(module, "visattn_kernels") and target.split(".")[0] in KERNELS_NEVER_IMPORT:
                found.append(f"{where}: kernels know torch alone")
            elif _is_family(module) and (_is_family(target) or target == "visattn.models"):
                found.append(f"{where}: a family imports no other family")
    names = {path.stem for path in scripts(root)}
    for path in [*known.values(), *scripts(root)]:
        found += [
            f"{path.relative_to(root)}:{line}: imports the script {target}.py"
            for line, target in imports(path, "", {})
            if target in names and not (path.parent / target).is_dir()
        ]
    return found


TREE = [
    "kernels/visattn_kernels/__init__.py",
    "kernels/visattn_kernels/checks.py",
    "kernels/visattn_kernels/op/__init__.py",
    "kernels/visattn_kernels/op/api.py",
    "kernels/visattn_kernels/op/ops.py",
    "tools/train.py",
    "tools/visattn_tools/engine.py",
    "visattn/__init__.py",
    "visattn/layers/__init__.py",
    "visattn/layers/a.py",
    "visattn/models/__init__.py",
    "visattn/models/_pyramid.py",
    "visattn/models/biformer.py",
    "visattn/models/van.py",
]


def test_imports_point_one_way() -> None:
    assert direction_violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("visattn/layers/a.py", "from visattn.models import biformer", "visattn.models.biformer, which lies above it"),
        ("visattn/layers/a.py", "from ..models.biformer import BiFormer", "visattn.models.biformer, which lies above"),
        ("visattn/layers/a.py", "from .. import __version__", "imports visattn, which lies above it"),
        ("visattn/models/van.py", "from .biformer import Block", "a family imports no other family"),
        ("visattn/models/van.py", "from . import biformer", "a family imports no other family"),
        ("visattn/models/van.py", "from visattn.models import BiFormer", "a family imports no other family"),
        ("visattn/models/van.py", "def f():\n    import visattn_tools.engine", "which lies above it"),
        ("visattn/models/van.py", "import train", "imports the script train.py"),
        ("kernels/visattn_kernels/op/api.py", "from timm.layers import Mlp", "kernels know torch alone"),
        ("kernels/visattn_kernels/op/api.py", "import visattn", "which lies above it"),
        ("visattn/models/van.py", "from ._pyramid import PyramidBackbone", ""),
        ("visattn/models/van.py", "from visattn.layers import a\nimport visattn_kernels", ""),
        ("visattn/models/__init__.py", "from . import biformer, van", ""),
        ("kernels/visattn_kernels/op/api.py", "from .ops import f\nfrom ..checks import g\nimport torch", ""),
        ("tools/visattn_tools/engine.py", "import timm, visattn\nfrom visattn.models import biformer", ""),
        ("tools/train.py", "from visattn_tools.engine import train", ""),
    ],
)
def test_the_direction_check_finds_what_it_should(tmp_path: Path, path: str, line: str, complaint: str) -> None:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / path).write_text(line + "\n")
    found = direction_violations(tmp_path)
    assert len(found) == bool(complaint), found
    if complaint:
        assert complaint in found[0]


@pytest.mark.parametrize("triton", ["as installed", "absent"])
def test_import_is_silent_and_quick_and_needs_no_triton(triton: str) -> None:
    """After timm it costs less than a second of the processor, and brings in nothing but ourselves and torch."""
    code = (
        "import sys, time, timm\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import visattn, visattn_kernels\n"
        "spent = time.process_time() - start\n"
        "assert spent < 1, spent\n"
        "more = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert more <= {'torch', 'visattn', 'visattn_kernels'}, more\n"
        "assert visattn.list_models()\n"
    )
    if triton == "absent":
        code = "import sys\nsys.modules['triton'] = None  # makes `import triton` raise\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # torch itself logs one line when its FLOP counter, where our formulas are registered, meets no triton.
    errors = [line for line in done.stderr.splitlines() if "torch/utils/flop_counter.py" not in line]
    assert (done.returncode, done.stdout, errors) == (0, "", [])


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any(
        "jit" in ast.unparse(decorator) and "triton" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def _unannotated(node: ast.FunctionDef, is_method: bool) -> list[str]:
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    positional = [*node.args.posonlyargs, *node.args.args]
    arguments = positional[int(is_method and not static) :] + node.args.kwonlyargs
    arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg != "ctx"]  # autograd.Function's context
    return missing + (["return"] if node.returns is None and node.name != "__init__" else [])


def api_violations(path: Path) -> Iterator[str]:
    """Public functions without annotations or docstring, public classes without docstring, methods unannotated."""
    for node in ast.parse(path.read_text(), str(path)).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not _is_public(node.name):
            continue
        where = f"{path.name}:{node.lineno}: {node.name}"
        if isinstance(node, ast.FunctionDef):
            functions = [] if _is_kernel(node) else [(node.name, node, False)]
        else:
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and _is_public(m.name)]
            functions = [(f"{node.name}.{m.name}", m, True) for m in methods]
        if ast.get_docstring(node) is None and (functions or isinstance(node, ast.ClassDef)):
            yield f"{where} has no docstring"
        for name, function, is_method in functions:
            if missing := _unannotated(function, is_method):
                yield f"{path.name}:{function.lineno}: {name} lacks annotations: {', '.join(missing)}"


def test_public_api_is_annotated_and_documented() -> None:
    paths = [path for name, path in modules(ROOT).items() if not is_inside(name, "visattn_tools")]
    assert [violation for path in paths for violation in api_violations(path)] == []


def test_the_api_check_finds_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "def f(x, *, y: int, **kwargs): pass\n"
        "def _private(x): pass\n"
        "class A:\n"
        "    def forward(self, x) -> int: pass\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): pass\n"
        "    def _hidden(self, x): pass\n"
        "@triton.jit\n"
        "def kernel(q_ptr, BLOCK): pass\n"
        "def good(x: int) -> int:\n"
        "    '''Says what it does.'''\n"
    )
    assert list(api_violations(path)) == [
        "m.py:1: f has no docstring",
        "m.py:1: f lacks annotations: x, kwargs, return",
        "m.py:3: A has no docstring",
        "m.py:4: A.forward lacks annotations: x",
        "m.py:6: A.backward lacks annotations: g, return",
    ]


def test_files_can_be_read_in_one_sitting() -> None:
    """A model file may be longer: its tail is cfgs."""
    folders = ("visattn", "kernels", "tools", "tests", "configs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in paths
        if not _is_family(f"visattn.models.{path.stem}") or path.parent != ROOT / "visattn/models"
    }
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_version_stands_in_one_place() -> None:
    """pyproject.toml reads it from the package, so an installed package cannot say something else."""
    assert 'version = { attr = "visattn.__version__" }' in (ROOT / "pyproject.toml").read_text()
    with contextlib.suppress(PackageNotFoundError):  # run from the source tree
        assert visattn.__version__ == version("visattn")
