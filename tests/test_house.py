"""The layout keeps its promises: nothing is shadowed, the core is lean, kernels/ is portable."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from imports import circles, imports, modules

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *path: Path) -> str:
    """What a fresh interpreter prints, with these folders first on sys.path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=path[-1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "integrations", "tests", "benchmarks"])
def test_a_checkout_on_the_path_shadows_no_package(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("WHOSE = 'theirs'")
    assert run_python(f"import {name}; print({name}.WHOSE)", ROOT, tmp_path) == "theirs"


def test_the_core_needs_torch_and_triton_alone(tmp_path):
    heavy = ("transformers", "typer", "rich", "matplotlib", "PIL", "sglang")
    code = (
        "import sys, vlcache_triton.pool.compress, vlcache_triton.pool.streaming;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run_python(code, ROOT, tmp_path) == "[]"


def test_kernels_import_only_torch_triton_and_each_other():
    allowed = {"__future__", "torch", "triton", *sys.stdlib_module_names}
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= allowed, (file.name, roots)


def test_kernels_work_copied_into_an_engine(tmp_path):
    package = tmp_path / "engine" / "attention"
    package.mkdir(parents=True)
    for file in (ROOT / "kernels").glob("*.py"):
        (package / file.name).write_text(file.read_text())
    code = "from engine.attention import score, select, compact, decode; print('ok')"
    assert run_python(code, tmp_path) == "ok"


# Each imports from those before it, and from itself, only.
FLOORS = ("kernels", "ops", "recipe", "pool", "integrations", "apps")


def floor_of(module: str) -> str:
    parts = module.split(".")
    if parts[1:3] == ["integrations", "lmms_eval"]:  # which runs what the commands run
        return "apps"
    return parts[1] if parts[1:] and parts[1] in FLOORS else "door"


@pytest.fixture(scope="module")
def graph():
    import vlcache_triton

    files = modules()
    return {name: imports(name, files, vlcache_triton._HOMES) for name in files}


def test_imports_point_down_only(graph):
    for module, others in graph.items():
        floor = floor_of(module)
        if floor == "door":
            continue
        for other in others - {"vlcache_triton"}:  # for its version
            assert FLOORS.index(floor_of(other)) <= FLOORS.index(floor), (module, other)
            ours, theirs = module.split(".")[2:3], other.split(".")[2:3]
            if floor_of(other) == "integrations" == floor:
                assert ours == theirs, (module, other)


def test_imports_run_in_no_circle(graph):
    assert circles(graph) == []


def test_what_is_too_long_to_hold_in_the_head_says_why():
    """Of statements, without signature and docstring: over 60 lines, of a kernel 100."""
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            says = ast.get_docstring(node) or ""
            first = node.body[min(bool(says), len(node.body) - 1)]
            most = 100 if file.name.endswith("_kernels.py") else 60
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= most or f"ver {most} lines" in says, (file.name, node.name, length)


def test_the_package_is_imported_without_torch():
    """What it offers comes when it is asked for; an unknown name is an error as ever."""
    code = (
        "import sys, vlcache_triton; assert 'torch' not in sys.modules;"
        "assert {*vlcache_triton.__all__, '__version__'} <= set(dir(vlcache_triton));"
        "assert not hasattr(vlcache_triton, 'nothing');"
        "from vlcache_triton import VLCacheConfig, layer_budgets;"
        "assert 'transformers' not in sys.modules;"
        "from vlcache_triton import vl_cache;"
        "print(VLCacheConfig().budget, layer_budgets.__name__, vl_cache.__name__)"
    )
    assert run_python(code, ROOT) == "0.1 layer_budgets vl_cache"


def test_without_transformers_vl_cache_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from vlcache_triton import VLCacheConfig, layer_budgets\n"
        "try:\n    from vlcache_triton import vl_cache\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error)"
    )
    name, message = run_python(code, ROOT).split(maxsplit=1)
    assert name == "transformers"
    assert "pip install 'vlcache-triton[transformers]'" in message


def test_a_type_checker_sees_what_the_package_offers():
    """Which is written twice: where type checkers look, and where Python does."""
    import vlcache_triton

    tree = ast.parse((ROOT / "vlcache_triton" / "__init__.py").read_text())
    typed = {
        alias.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == vlcache_triton._HOMES
    assert sorted(typed) == vlcache_triton.__all__
