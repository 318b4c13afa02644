"""How a picture of a page is written."""

from pathlib import Path
from typing import TYPE_CHECKING

from ghopt.extras import from_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(picture: "Figure", path: Path) -> None:
    """Write a picture, as .svg or .png: the same bytes from the same figures.

    Text stays text, so that it can be searched and read aloud. The background is white,
    also on a dark page.

    Raises:
        ImportError: if matplotlib is missing.
    """
    with from_extra("bench"):
        from matplotlib import rc_context
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "ghopt", "svg.fonttype": "none"}):
        picture.savefig(path, metadata=metadata, dpi=150, facecolor="white")
