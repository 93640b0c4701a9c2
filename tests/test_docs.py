"""Examples in the documents run as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(match.group(1), id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, match in enumerate(re.finditer(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, capsys):
    if "import torch" in code:
        pytest.importorskip("torch", reason="needs PyTorch: pip install 'jax_fp8attn[torch]'")
    if "flax" in code:
        pytest.importorskip("flax", minversion="0.12.12", reason="the example needs flax 0.12.12 or newer")
    exec(compile(code, "example", "exec"), {})
    expected = re.findall(r"print\(.*\)  # (.*)", code)
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed


def test_the_quick_start_is_there():
    assert len(EXAMPLES) >= 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
