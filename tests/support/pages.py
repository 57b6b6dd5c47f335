"""The scripts that the pages in docs/ show, and what is expected of what they print. A page is their only source."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
NEED_THE_EXTRA = {"accelerate", "lightning", "timm", "transformers"}


def script(name: str, folder: Path) -> Path:
    """Writes the one Python script of a page into a folder."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGES[name].read_text(), re.S | re.M)
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
