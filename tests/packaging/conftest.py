"""Trees that a package may be built from, and new environments to install it in."""

import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from building import ROOT, build, run

LINKS = ("kernels", "integrations")  # of vlcache_triton, to the top of the tree


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The archive, built from the checkout."""
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The tree in the archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def without_links(unpacked, tmp_path_factory) -> Path:
    """The checkout as an archive of GitHub's or Git on Windows leaves it: links are text files."""
    tree = tmp_path_factory.mktemp("zip") / "tree"
    shutil.copytree(unpacked, tree)
    for name in LINKS:
        shutil.rmtree(tree / "vlcache_triton" / name)
        (tree / "vlcache_triton" / name).write_text(f"../{name}")
    return tree


@pytest.fixture(scope="session")
def wheel(unpacked, tmp_path_factory) -> Path:
    """The wheel built from the sdist, which is how pip builds."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def new_environment(tmp_path):
    """`new_environment("some.whl")`: a Python that has it, and our dependencies from this one."""

    def create(*to_install: object) -> Path:
        folder = tmp_path / "environment"
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
        python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        ours = [path for path in sys.path if Path(path).name.endswith("-packages")]
        (site / "dependencies.pth").write_text("\n".join(ours))  # nested .pth files are not read
        pip = (sys.executable, "-m", "pip", "--python", python)
        options = ("install", "-q", "--no-deps", "--no-index", "--no-build-isolation")
        run(*pip, *options, *to_install, cwd=tmp_path)
        return python

    return create
