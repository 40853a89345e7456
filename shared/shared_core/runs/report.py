"""The report: the same text, tables and plots as ``report.md`` and as one static HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from shared_core.runs.json_files import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d5dce3; text-align: right }
th { background: #f2f5f8 } th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { color: #51606e; font-size: .9rem }
.note { background: #fff6dd; border-left: 4px solid #d9a400; padding: .5rem 1rem }
"""


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Report:
    """Collects sections in order; ``write`` puts them beside each other in both forms."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._markdown: list[str] = [f"# {title}"]
        self._html: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Start a section."""
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._markdown.append(text)
        self._html.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a paragraph that must not be overlooked."""
        self._markdown.append(f"> **{text}**")
        self._html.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; floats are shown with four digits, ``None`` as a dash.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"row {list(row)} has {len(row)} cells, expected {len(columns)}")
        cells = [[_cell(value) for value in row] for row in rows]
        lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        self._markdown.append("\n".join(lines))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
        )
        self._html.append(f"<table><tr>{head}</tr>{body}</table>")

    def figure(self, picture: str | Path, caption: str) -> None:
        """Add a PNG: linked from the Markdown by name, embedded in the page.

        Raises:
            FileNotFoundError: the picture is missing.
        """
        path = Path(picture)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        self._markdown.append(f"![{caption}]({path.name})\n\n*{caption}*")
        self._html.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def write(self, folder: str | Path, *, name: str = "report") -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.html``; pictures must lie in the same folder."""
        markdown, page = Path(folder) / f"{name}.md", Path(folder) / f"{name}.html"
        text = "\n\n".join(self._markdown) + "\n"
        document = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._html)
            + "\n</body></html>\n"
        )
        write_text(markdown, text)
        write_text(page, document)
        return markdown, page
