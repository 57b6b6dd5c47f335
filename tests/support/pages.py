"""The code that README.md and docs/ show. A page is the only source of its code.

A page in docs/frameworks/ is one script. On any other page, the blocks together are one.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {page.stem: page for page in sorted((ROOT / "docs" / "frameworks").glob("*.md"))}
NEED_THE_EXTRA = {"accelerate", "lightning", "timm", "transformers"}


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.S | re.M)


def pages() -> dict[str, Path]:
    """Return README.md and the pages of docs/ that have Python blocks, except those of frameworks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {
        page.relative_to(ROOT).as_posix(): page for page in found if page not in FRAMEWORKS.values() and blocks(page)
    }


def script(name: str, folder: Path) -> Path:
    """Write the script of a framework's page into a folder."""
    (code,) = blocks(FRAMEWORKS[name])
    path = folder / "train.py"  # not the page's name, which is a package's
    path.write_text(code)
    return path


def assert_trained_by_kernels(printed: str, processes: int = 1, torchs: dict[str, int] | None = None) -> None:
    """`torchs` is what torch's code had stepped in that process before."""
    # Processes that print at the same time may get their lines' ends mixed up.
    losses = re.findall(r"loss (\d+\.\d{3}) -> (\d+\.\d{3})", printed)
    stats = [ast.literal_eval(found) for found in re.findall(r"\{'kernel': \{.*?\}, 'torch': \{.*?\}\}", printed)]
    assert len(losses) == len(stats) == processes, printed
    for first, last in losses:
        assert float(last) < 0.5 * float(first)
    for seen in stats:
        assert sum(seen["kernel"].values()) > 0
        assert seen["torch"] == (torchs or {})
