"""What the README shows works as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_python_example_runs_and_compresses(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    kept, before, after = re.fullmatch(
        r"(\[.*\]) (\d+) (\d+)", capsys.readouterr().out.strip()
    ).groups()
    assert len(re.findall(r"\d+", kept)) == 8
    assert abs(int(after) / int(before) - 0.6) < 0.01


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parent.parent
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    for target in targets:
        assert (root / target).exists(), target
