"""Class names in pictures: a font that has their letters, else the letters written as escapes.

Fonts are those that matplotlib finds on the machine. The first of :data:`PREFERRED` that has every
letter is taken, else any that has them; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from shared_core.texts import printable

PREFERRED = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei",
    "PingFang SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
HELP = "install one with these letters, such as the package fonts-noto-cjk"


class Font(NamedTuple):
    """A font by its family and file."""

    name: str
    file: str


def letters_of(texts: Iterable[str]) -> frozenset[int]:
    """The code points beyond ASCII."""
    return frozenset(ord(c) for text in texts for c in printable(text) if ord(c) > 126)


@cache
def font_for(letters: frozenset[int]) -> Font | None:
    """A font that has all the letters; None where no font of this machine has them."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    places = {name: place for place, name in enumerate(PREFERRED)}
    known = sorted(fontManager.ttflist, key=lambda one: places.get(one.name, len(places)))
    for one in known:
        if not Path(one.fname).is_file() or one.style != "normal":
            continue
        try:
            if letters <= FT2Font(one.fname).get_charmap().keys():
                return Font(one.name, one.fname)
        except (OSError, RuntimeError):  # a damaged font
            continue
    return None


def lacking_font(texts: Iterable[str]) -> str | None:
    """A note where names are escaped in pictures for lack of a font; None where they are not."""
    letters = letters_of(texts)
    if font_for(letters) is not None:
        return None
    shown = "".join(map(chr, sorted(letters)[:8]))
    return f"no font of this machine has {shown}: pictures show names as escapes; {HELP}"


def drawable(text: str, font: Font | None) -> str:
    """The text as it can be drawn: on one line, with escapes where there is no font for it."""
    text = printable(text)
    return text if font is not None else text.encode("ascii", "backslashreplace").decode()


@contextmanager
def figure_texts(texts: Iterable[str]) -> Iterator[Callable[[str], str]]:
    """Matplotlib with a font for the texts; gives what makes each of them ready to be drawn."""
    from matplotlib import rc_context

    font = font_for(letters_of(texts))
    families = [font.name, "DejaVu Sans"] if font else ["DejaVu Sans"]
    with rc_context({"font.family": families}):
        yield lambda text: drawable(text, font).replace("$", r"\$")  # no formula
