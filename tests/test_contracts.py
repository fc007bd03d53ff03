"""What must hold of the source as a whole: the laws that no single test of a part can see."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vitdense"
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(
    file
    for folder in ("vitdense", "tools", "examples", "tests", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)

# A room may import from itself and from rooms with a lower number.
FLOORS = {
    "structures": 0,
    "declarations": 0,
    "registry": 1,
    "config": 2,
    "ops": 2,
    "layers": 3,
    "backbones": 4,
    "necks": 4,
    "losses": 4,
    "heads": 5,
    "models": 6,
    "data": 7,
    "metrics": 8,
    "engine": 9,
    "inference": 10,
    "convert": 10,
    "testing": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> set[str]:
    """Every module that a file names in an import, wherever the import stands."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name_of(file)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def type_checking_imports(file: Path) -> set[str]:
    blocks = [
        node
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        f"{node.module}.{alias.name}"
        for block in blocks
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} <= set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file):
    room = room_of(file)
    wrong = []
    for module in imports_of(file) - type_checking_imports(file):
        parts = module.split(".")
        if parts[0] != "vitdense" or len(parts) < 2 or parts[1] == room:
            continue
        if parts[1] in FLOORS and FLOORS[parts[1]] >= FLOORS[room]:
            wrong.append(module)
    assert not wrong, f"{name_of(file)} is on floor {FLOORS[room]} and imports {wrong}"


def test_modules_never_see_a_config():
    rooms = {"structures", "ops", "layers", "backbones", "necks", "losses", "heads", "models",
             "data", "metrics"}  # fmt: skip
    for file in FILES:
        if room_of(file) in rooms:
            seen = [name for name in imports_of(file) if name.startswith("vitdense.config")]
            assert not seen, f"{name_of(file)} imports {seen}"


@pytest.mark.parametrize("file", ALL_PYTHON, ids=name_of)
def test_files_and_functions_are_small(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    limit = 700 if file.name.startswith("test_") else 400
    assert lines <= limit, f"{name_of(file)} has {lines} lines: make it two"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{name_of(file)}:{node.lineno} {node.name} has {length} lines"


def test_the_median_function_is_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] < 15


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_names_say_what_they_are(file):
    tree = tree_of(file)
    assert ast.get_docstring(tree), f"{name_of(file)}: no docstring"
    nodes = [
        node
        for owner in [tree, *public_classes(tree)]
        for node in owner.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    silent = [
        f"{name_of(file)}:{node.lineno} {node.name}"
        for node in nodes
        if not ast.get_docstring(node) and not _speaks_for_itself(node, tree)
    ]
    assert not silent, "no docstring: " + ", ".join(silent)


def public_classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def _speaks_for_itself(node: ast.AST, tree: ast.Module) -> bool:
    """Methods are documented where they are promised; the smallest are clear by their name."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    is_short = (node.end_lineno or 0) - node.lineno < 3
    return node not in tree.body and (node.name in promised_methods() or is_short)


@cache
def promised_methods() -> set[str]:
    """Names of methods that some class of the package, or one of torch's or Python's, explains."""
    ours = {
        node.name
        for file in FILES
        for owner in tree_of(file).body
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    }
    return ours | {"extra_repr", "state_dict", "load_state_dict", "error", "format_help"}


FORBIDDEN = {
    r"\b(TODO|FIXME|XXX|HACK)\b": "finish it, or open an issue",
    r"\.cuda\(": "use .to(device)",
    r"(?<!cost\.)nan_to_num": "a loss that is not finite must be seen",
    r"except:|except Exception:\s*pass": "say which errors, and what happens then",
    r"import \*": "name what you import",
}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_forbidden_constructs(file):
    text = file.read_text(encoding="utf-8")
    for pattern, remedy in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert not found, f"{name_of(file)}: {found and found[0]!r}: {remedy}"


def test_not_implemented_is_only_said_by_promises():
    """A method of a base class that subclasses fill may raise it; a branch of a method may not."""
    for file in FILES:
        promises = [
            node.body[-1]
            for node in ast.walk(tree_of(file))
            if isinstance(node, ast.FunctionDef) and len(node.body) <= 2
        ]
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
                assert node in promises, f"{name_of(file)}:{node.lineno} is not implemented"


def tracked() -> list[Path]:
    """Every file of the repository; without git, what lies in the folders that it holds."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.splitlines()
    else:
        names = [name_of(file) for file in ALL_PYTHON]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_paths_of_a_machine():
    pattern = re.compile(r"(?<![\w.])/(work|home|root|Users|tmp/venv|workspace)/\w+")
    for file in tracked():
        if file.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ""}:
            found = pattern.search(file.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name_of(file)} holds the path {found and found[0]}"


def test_nothing_large_is_tracked():
    large = [name_of(file) for file in tracked() if file.stat().st_size > 1_500_000]
    assert not large


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "timm", "torchvision", "numpy", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import vitdense",
        "import vitdense.registry, vitdense.declarations",
        "import vitdense.config",
        "import vitdense.cli; vitdense.cli.build_parser()",
        "from vitdense import HEADS; HEADS.names(); HEADS.resolve('upernet')",
    ],
)
def test_light_modules_import_nothing_heavy(code):
    loaded = run_python(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip().splitlines()[-1] == "[]"


def test_parts_import_no_optional_library_at_the_top():
    """A head, a neck or a metric costs the import of torch, and of nothing beside it."""
    code = (
        "import vitdense.heads.base, vitdense.necks.base, vitdense.models.pyramid, sys\n"
        "print([m for m in ('timm', 'torchvision', 'scipy', 'pycocotools', 'PIL.Image') "
        "if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_public_api():
    import vitdense

    for name in vitdense.__all__:
        assert getattr(vitdense, name) is not None
    promised = {"BACKBONES", "NECKS", "HEADS", "MODELS", "DATASETS", "METRICS", "load"}
    assert promised <= set(vitdense.__all__) <= set(dir(vitdense))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vitdense.lode


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=name_of)
def test_all_names_exist_and_are_sorted(file):
    names = [
        ast.literal_eval(node.value)
        for node in tree_of(file).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    for exported in names:
        assert len(set(exported)) == len(exported)
        text = file.read_text(encoding="utf-8")
        unknown = [name for name in exported if len(re.findall(rf"\b{name}\b", text)) < 2]
        assert not unknown, f"{name_of(file)} exports {unknown} and has them not"


def test_every_registered_part_declares_its_options():
    from vitdense.registry import REGISTRIES

    for registry in REGISTRIES.values():
        assert registry.names(), registry.kind
        for name in registry.names():
            declaration, _ = registry.resolve(name)
            where = f"{registry.kind} {name} ({declaration.place})"
            assert declaration.doc, f"{where}: no docstring"
            for option in declaration.options.values():
                assert option.meaning, f"{where}: option '{option.name}' has no comment"
