"""The rules of the house that no single module can keep: links, packages, layers, bans, sizes, documents.

Each rule that matters is a test with the replacement in its message; a rule that lives only in a document is forgotten.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / "src" / "forebay"
PACKAGES = sorted(path.name for path in LINKS.iterdir() if path.is_symlink())
SERVED = [name for name in PACKAGES if name != "bench"]
GENERATED = {"build", "dist", "htmlcov", "__pycache__"}
FUNCTION_LINES_MAX = 80
FUNCTION_LINES_P95_MAX = 40
ENVIRONMENT_READERS = {"daemon/config.py", "transports/paths.py", "tiers/nvme_io_process.py"}
TOOL_TIMEOUT_S = 100

# Tests of something that is no single module: a contract over several, or behaviour of the whole.
CROSS_CUTTING = {"e2e", "engines", "faults", "gpu", "deploy"}
WHOLE_FOLDER = {"contract"}

pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tool(name: str) -> str:
    """A development tool, from the environment the tests run in."""
    return str(Path(sys.executable).parent / name)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
    )


def files(*suffixes: str) -> Iterator[Path]:
    """Every file of the repository with one of the suffixes; nothing generated, no link followed twice."""
    for folder, names, found in os.walk(ROOT):
        names[:] = [
            name for name in names if not (name in GENERATED or name.startswith(".") or name.endswith(".egg-info"))
        ]
        yield from (Path(folder, name) for name in found if name.endswith(suffixes))


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def copy_tree(target: Path) -> Path:
    """What a wheel is built from, without the repository's caches."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("src", *PACKAGES):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    return target


# --- packaging -----------------------------------------------------------------------------------------------------


def test_every_code_folder_is_linked_under_the_import_package() -> None:
    """A folder without its link would install as nothing, silently."""
    folders = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert folders == PACKAGES, "ln -s ../../FOLDER src/forebay/FOLDER"
    for name in PACKAGES:
        assert os.readlink(LINKS / name) == f"../../{name}"


def test_repository_root_is_no_package() -> None:
    """With an __init__.py in the root, type checkers name every module after the checkout's folder."""
    assert not (ROOT / "__init__.py").exists()


def test_wheel_built_from_the_source_archive_holds_every_module(tmp_path: Path) -> None:
    """Links and packaging back ends lose folders without a word; list what is really in there."""
    source = tmp_path / "source"
    source.mkdir()
    copy_tree(source)
    output = tmp_path / "dist"
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = {f"forebay/{path.relative_to(ROOT)}" for path in modules(*PACKAGES)}
    expected |= {"forebay/__init__.py", "forebay/py.typed"}
    expected |= {f"forebay/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.cu*")}
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    with tarfile.open(next(output.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/src/forebay/py.typed") for name in archive.getnames())


def test_base_installation_has_lower_bounds_and_no_array_framework() -> None:
    """An engine's environment must not be changed by installing a client."""
    dependencies = pyproject["project"]["dependencies"]
    assert all(">=" in dependency for dependency in dependencies)
    names = {re.split(r"[><=]", dependency)[0] for dependency in dependencies}
    assert names == {"pyzmq", "msgpack", "psutil", "prometheus-client", "lmdb", "numpy", "xxhash"}


def test_version_is_the_same_everywhere() -> None:
    """An operator reads it from the command, the package and the change log."""
    version = pyproject["project"]["version"]
    assert f'__version__ = "{version}"' in (LINKS / "__init__.py").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_check_script_can_be_executed() -> None:
    """A clone keeps the mode; without it the check is not run at all."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- layers --------------------------------------------------------------------------------------------------------


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return run(tool("lint-imports"), "--no-cache", cwd=root, PYTHONPATH=str(root / "src"))


def test_layers_hold(tmp_path: Path) -> None:
    """The contracts of pyproject.toml over a copy of the tree, as the tests below plant into."""
    done = lint_imports(copy_tree(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("folder", "planted"),
    [
        ("client", "forebay.daemon"),
        ("client", "forebay.tiers"),
        ("client", "lmdb"),
        ("daemon", "forebay.client"),
        ("daemon", "numpy"),
        ("kernels", "forebay.kvstore"),
        ("kvstore", "socket"),
        ("kvstore", "time"),
        ("kvstore", "zmq"),
        ("kvstore", "forebay.transports"),
        ("tiers", "forebay.daemon"),
        ("transports", "forebay.tiers"),
    ],
)
def test_planted_import_breaks_the_layers(tmp_path: Path, folder: str, planted: str) -> None:
    """A contract that cannot fail guards nothing."""
    module = copy_tree(tmp_path) / folder / "planted.py"
    module.write_text(f"import {planted}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout[-3000:]
    assert f"forebay.{folder}.planted" in done.stdout
    assert planted in done.stdout


# --- bans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle\n", "TID251"),
        ("import kernels\n", "TID251"),
        ("from daemon import cli\n", "TID251"),
        ("from . import index\n", "TID252"),
        ("import time\n\ntime.sleep(1)\n", "TID251"),
        ("import msgpack\n\nprint(msgpack.ExtType)\n", "TID251"),
        ("eval('1')\n", "S307"),
        ("try:\n    f()\nexcept Exception:\n    pass\n", "BLE001"),
        ("x = 1  # FIX" + "ME: later\n", "FIX001"),
        ("x = 1  # type: ignore\n", "PGH003"),
    ],
)
def test_banned_code_is_refused(code: str, rule: str) -> None:
    """The linter's settings, tried: a rule that was dropped by mistake would not be noticed otherwise."""
    command = [tool("ruff"), "check", "--no-cache", "--output-format=concise", "--stdin-filename=kvstore/x.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    assert done.returncode == 1
    assert rule in done.stdout


def _reads_environment(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}:
            return True
        imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        if imported & {"environ", "environb", "getenv"}:
            return True
    return False


def test_environment_is_read_in_three_places_only() -> None:
    """Settings are in one tree (daemon/config.py); only the runtime directory is found by a variable as well.

    A drive's I/O process is handed the daemon's with one variable more. The benchmark hands environments to the
    processes it starts, and has no settings.
    """
    readers = {
        str(path.relative_to(ROOT)) for path in modules(*SERVED) if _reads_environment(ast.parse(path.read_text()))
    }
    assert readers <= ENVIRONMENT_READERS, "take it from daemon/config.py"


def test_nothing_is_left_for_later() -> None:
    """Documents included; what is worth doing later belongs into the tracker."""
    pattern = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    suffixes = (".py", ".md", ".toml", ".yml", ".yaml", ".json", ".service", "Makefile", "Containerfile")
    left = [
        f"{path.relative_to(ROOT)}: {m[0]}" for path in files(*suffixes) for m in pattern.finditer(path.read_text())
    ]
    assert left == []


# --- sizes ---------------------------------------------------------------------------------------------------------


def _function_lines(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            yield end - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_no_function_outgrows_the_screen() -> None:
    """Split it where the branching ends."""
    folders = [folder for folder in (*PACKAGES, "tests") if (ROOT / folder).is_dir()]
    long = [entry for path in modules(*folders) for entry in _function_lines(path) if entry[0] > FUNCTION_LINES_MAX]
    assert long == []


def test_tail_of_function_lengths_stays_short() -> None:
    """What makes a code base hard to live in is the tail, not the median: 95 of 100 functions, in each folder."""
    tails = {}
    for package in PACKAGES:
        lengths = sorted(lines for path in modules(package) for lines, _ in _function_lines(path))
        tails[package] = lengths[int((len(lengths) - 1) * 0.95)] if lengths else 0
    assert {name: lines for name, lines in tails.items() if lines > FUNCTION_LINES_P95_MAX} == {}


def test_every_module_says_what_it_is() -> None:
    """A file opens with two to ten lines: what, why this way, what was rejected."""
    silent = [
        str(path.relative_to(ROOT)) for path in modules(*PACKAGES) if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_test_leads_to_its_module() -> None:
    """tests/kvstore/test_index.py is for kvstore/index.py; test_index_model.py may be as well."""
    lost = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder, name = path.parent.relative_to(ROOT / "tests"), path.stem.removeprefix("test_")
        if folder == Path() or folder.parts[0] in CROSS_CUTTING:
            continue
        beside = {module.stem.strip("_") for module in (ROOT / folder).glob("*.py")} | {folder.name}
        if name not in WHOLE_FOLDER and not any(name == module or name.startswith(f"{module}_") for module in beside):
            lost.append(str(path.relative_to(ROOT)))
    assert lost == []


# --- documents -----------------------------------------------------------------------------------------------------

DOCUMENTS = sorted(files(".md"))


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """Heading anchors as forges make them: lower case, punctuation gone, blanks to hyphens."""
    headings = re.findall(r"^#+ +(.*?)\s*$", _prose(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    """Files and headings; addresses on the network are not fetched."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    assert broken == []


def test_architecture_names_types_and_files_that_exist() -> None:
    """It tells readers what to search for, so what it names must be found: classes and paths in backquotes."""
    text = _prose((ROOT / "ARCHITECTURE.md").read_text())
    trees = [ast.parse(path.read_text()) for path in modules(*PACKAGES)]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    named = set(re.findall(r"`([A-Z][a-z]\w+)(?:\.\w+\(\))?`", text))
    assert named - classes == set()
    paths = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_makefile_lists_its_targets() -> None:
    """The two commands of the first screen, and what stands behind them."""
    done = run("make", "--no-print-directory", "help")
    assert done.returncode == 0, done.stderr
    for target in ("demo", "test", "bench", "lint", "format", "clean"):
        assert f"make {target} " in done.stdout
