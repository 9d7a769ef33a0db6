"""The Python snippets of the README and of the documentation run, page by page, in order, in one namespace each."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
_ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[tuple[int, str]]:
    """First line and code of every Python block of a page, those marked `no-run` left out."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip().strip("{}").replace(".", " ").split()
        if not info or info[0] != "python" or "no-run" in info:
            continue
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        found.append((text.count("\n", 0, match.start("code")) + 1, code))
    return found


PAGES = [page for page in _ALL if snippets(page)]


@pytest.mark.timeout(1200)  # plans simulate several training steps
@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_snippets_run(page, tmp_path, monkeypatch):
    blocks = snippets(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        # line numbers of the page in tracebacks
        compiled = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)
        try:
            exec(compiled, namespace)
        except Exception:
            pytest.fail(f"{page.relative_to(ROOT)}, block at line {line}:\n{traceback.format_exc()}")


def test_pages_have_snippets():
    assert sum(len(snippets(page)) for page in PAGES) >= 20


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
