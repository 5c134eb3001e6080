"""The code in the README and the docs runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    if not blocks:
        pytest.skip("no code on this page")
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_files_a_page_names_exist(page: Path) -> None:
    pattern = r"\b(?:dynamics|experiments|configs|tests|benchmarks)/[\w/.]+\.py\b"
    named = re.findall(pattern, page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
