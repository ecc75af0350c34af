"""Packages have all files whatever they are built from, and work in a new environment."""

import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from building import ROOT, build, files_in, run

ABSENT = ("sglang", "lmms_eval", "kernels")  # what adapters may miss: no dependency of the tests
IMPORT_ALL = f"""
import importlib, sys, vlcache_triton
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in {ABSENT}:
            raise
print(vlcache_triton.__file__)
"""


def package_in(wheel: Path) -> set[str]:
    """The files of the package that a wheel installs; its own metadata are left out."""
    names = [x for x in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in x]
    assert len(names) == len(set(names))
    return set(names)


def tracked() -> set[str]:
    """The files of the checkout; links are what they lead to, the CI's own are left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    left_out = (".ci/", "benchmarks/accuracy/checkpoint/")  # the latter is 21 MB
    files = {x for x in listed if (ROOT / x).is_file() and not x.startswith(left_out)}
    return files | files_in(ROOT / "vlcache_triton")


def test_an_sdist_has_the_files_of_the_checkout(sdist):
    with tarfile.open(sdist) as archive:
        names = [x.name.partition("/")[2] for x in archive.getmembers() if x.isfile()]
    assert len(names) == len(set(names))
    assert set(names) == tracked() | {"PKG-INFO"}


@pytest.mark.parametrize("tree", ["sdist", "checkout", "without links"])
def test_a_wheel_has_the_files_of_the_package(request, tmp_path, tree):
    if tree == "sdist":
        built = request.getfixturevalue("wheel")
    elif tree == "checkout":
        built = build("wheel", ROOT, tmp_path)
    else:
        built = build("wheel", request.getfixturevalue("without_links"), tmp_path)
    expected = files_in(ROOT / "vlcache_triton")
    assert "vlcache_triton/kernels/decode.py" in expected
    assert package_in(built) == expected


def test_a_wheel_works_in_a_new_environment(wheel, new_environment, tmp_path):
    """Every module is imported, and the script answers a page."""
    python = new_environment(wheel)
    modules = [
        x.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for x in sorted(package_in(wheel))
        if x.endswith(".py") and not x.endswith("__main__.py")
    ]
    where = run(python, "-c", IMPORT_ALL, *modules, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    answers = json.loads(run(python.with_name("vlcache"), "demo", "--json", cwd=tmp_path))
    assert answers["questions"]


@pytest.mark.parametrize("tree", ["checkout", "sdist"])
def test_an_editable_install_is_the_tree(unpacked, new_environment, tmp_path, tree):
    """And leaves nothing in the environment that could be imported for it."""
    folder = {"checkout": ROOT, "sdist": unpacked}[tree]
    python = new_environment("-e", folder)
    code = "import vlcache_triton.kernels.decode as x; print(x.__file__)"
    where = Path(run(python, "-c", code, cwd=tmp_path).strip())
    assert where == folder / "vlcache_triton" / "kernels" / "decode.py"
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    assert not (site / "vlcache_triton").exists()
