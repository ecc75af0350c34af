"""The documentation is true to the code: links, names, files, references, and what it runs."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import vlcache_triton

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"],
    key=lambda page: page.name,
)
FOLDERS = ("kernels", "integrations", "vlcache_triton", "examples", "tests", "benchmarks")
SOURCES = sorted({file.resolve() for name in FOLDERS for file in (ROOT / name).rglob("*.py")})
EVERY_TEXT = sorted(
    {*PAGES, ROOT / "README.md"}
    | {file.resolve() for name in FOLDERS for file in (ROOT / name).rglob("*.md")}
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Names of other libraries, and shapes' letters.
WRITTEN = {"gpu_report.md", ".venv/bin/activate"}  # by a command, not kept
FOREIGN = {
    "flash_attn_varlen_func",
    "get_text_config",
    "_can_set_attn_implementation",
    "AttentionInterface",
    "next_power_of_2",
    "trust_remote_code",
    "__init__",
}


def prose(page: Path) -> str:
    """The page without its fenced blocks and its mathematics."""
    return re.sub(r"```.*?```|\$`.*?`\$", "", page.read_text(), flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of its headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@cache
def defined() -> set[str]:
    """What the sources define: modules, functions, classes, arguments, attributes, constants."""
    names = {name for file in SOURCES for name in (*file.relative_to(ROOT).parts, file.stem)}
    for file in SOURCES:
        for found in re.findall(
            r"\b(?:def|class) (\w+)|\b([A-Za-z]\w*)\s*[:=](?!=)", file.read_text()
        ):
            names.update(found)
    return names


def exists(path: str, page: Path) -> bool:
    """From the page's folder, from the root, or under any of its folders; globs may match."""
    path = path.rstrip("/")
    return any(list(base.glob(path)) for base in (page.parent, ROOT)) or any(
        list((ROOT / folder).rglob(path)) for folder in FOLDERS
    )


@pytest.mark.parametrize("page", EVERY_TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in t]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@every_page
def test_named_files_exist(page):
    code = [*re.findall(r"`([^`\n]+)`", prose(page)), *blocks(page, "bash")]
    words = [word for part in code for word in re.split(r"[\s'\"=,:]+", part)]
    paths = [x for x in words if re.fullmatch(r"[\w.*/-]+\.(py|sh|md|txt|toml)", x)]
    paths += [x for x in words if re.fullmatch(r"[\w.]+(/[\w.*]+)+/?|\w+/", x)]
    for path in paths:
        assert path in WRITTEN or "NAME" in path or exists(path, page), path


@every_page
def test_named_functions_and_arguments_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        code = re.sub(r"[\w./*-]+\.(py|sh|md|txt|json|cff)\b", "", code)
        names = re.findall(r"\b(?:[A-Za-z]\w*_\w*|[A-Z][a-z]+[A-Z]\w+)\b", code)
        names += re.findall(r"\w+", code) if re.fullmatch(r"\w+(\.\w+)+", code) else []
        for name in names:
            assert name in defined() | FOREIGN, f"{name} in {code}"


@every_page
def test_python_blocks_run(page, capsys):
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), {})


def test_there_are_blocks_and_links_to_look_at():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 2
    assert sum(len(re.findall(r"\]\(", page.read_text())) for page in PAGES) > 50


def test_every_page_is_reached_from_another():
    texts = {page: page.read_text() for page in [*PAGES, ROOT / "README.md"]}
    for page in ROOT.glob("docs/*.md"):
        others = (text for other, text in texts.items() if other != page)
        assert any(f"{page.name})" in text for text in others), page.name


def test_references_to_the_recipe_resolve():
    recipe = (ROOT / "docs" / "recipe.md").read_text()
    headings = set(re.findall(r"^## (.*)$", recipe, re.MULTILINE))
    steps = {heading.split(":")[0] for heading in headings}
    found = 0
    for file in set(SOURCES) - {Path(__file__).resolve()}:
        text = " ".join(file.read_text().split())
        for first, last in re.findall(r"recipe steps? (\d)(?: to (\d))?", text):
            found += 1
            assert {f"Step {n}" for n in range(int(first), int(last or first) + 1)} <= steps, file
        for heading in re.findall(r'recipe: "([^"]+)"', text):
            found += 1
            assert heading in headings, file
    assert found >= 6


def test_the_drawing_is_well_formed():
    from xml.etree import ElementTree

    drawing = ElementTree.parse(ROOT / "docs" / "ragged-pool.svg").getroot()
    words = " ".join(drawing.itertext())
    for word in ("capacity", "head room", "seqused_k", "cu_seqlens_k", "block_table", "layer 1"):
        assert word in words


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["version"] == vlcache_triton.__version__
    assert {"message", "title", "authors", "license"} <= set(cited)
    (paper,) = cited["references"]
    assert paper["title"].startswith("VL-Cache") and "2410.23317" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Tu",
        "Vashchilenko",
        "Lu",
        "Xu",
    ]
