"""What the README shows works as it stands there."""

import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@cache
def run(index: int) -> tuple[dict[str, Any], str]:
    """What an example leaves, and what it prints."""
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(EXAMPLES[index], "README.md", "exec"), names)
    return names, printed.getvalue()


def example_with(text: str) -> int:
    (index,) = (i for i, code in enumerate(EXAMPLES) if text in code)
    return index


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_every_python_example_runs(index):
    run(index)


def test_the_model_of_the_example_compresses():
    _, printed = run(example_with("load_form_reader"))
    kept, before, after = re.fullmatch(r"(\[.*\]) (\d+) (\d+)", printed.strip()).groups()
    assert len(re.findall(r"\d+", kept)) == 8
    assert abs(int(after) / int(before) - 0.1) < 0.01


def test_the_kernels_of_the_example_attend_to_what_is_kept():
    x, _ = run(example_with("varlen_decode"))
    positions = x["kept"].indices[:200].long().split([60, 60, 40, 40])
    assert x["used"].tolist() == [61, 61, 41, 41]
    for segment, kept in enumerate(positions):
        first, head = (0, 300)[segment // 2], segment % 2
        k, v = (
            torch.cat([x[name][first + kept, head], x[f"new_{name}"][segment, 0]]).float()
            for name in ("k", "v")
        )
        weights = (x["new_q"][segment].float() @ k.T / 8).softmax(-1)
        torch.testing.assert_close(x["out"][segment].float(), weights @ v, atol=2e-3, rtol=2e-3)


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parent.parent
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    for target in targets:
        assert (root / target.partition("#")[0]).exists(), target
