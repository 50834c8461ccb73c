"""Tables of results: HTML on a page, and the same digits and marks as plain text, which a test compares.

The best of a column is bold, in plain text followed by a star. A value whose difference from the best is not resolved
carries the sign ≈.
"""

import html
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

UNRESOLVED = "≈"
MISSING = "–"


class Table:
    """A table with a name for each row and each column.

    Example:
        >>> Table({"one": {"NLL": 0.2, "seeds": 8}, "four": {"NLL": 0.1, "seeds": 8}}, best={"NLL": min}, digits=1)
             NLL  seeds
        one  0.2      8
        four 0.1*     8
        * best
    """

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, Any]],
        *,
        caption: str = "",
        best: Mapping[str, Any] | None = None,
        unresolved: Collection[tuple[str, str]] = (),
        digits: int | Mapping[str, int] = 3,
        note: str = "",
    ) -> None:
        """Take the values; they are written when the table is shown.

        Args:
            rows: the value of each column, by row. Text and whole numbers are shown as they are, other numbers and
                intervals with so many ``digits``; what is missing is a dash.
            caption: what the table shows, with its units.
            best: ``min`` or ``max`` by column: the row with that value is the best.
            unresolved: pairs (row, column) that cannot be told from the best.
            digits: behind the decimal point: of all columns, or by column, 3 where a column is not named.
            note: a sentence under the table.
        """
        self.rows, self.caption, self.note = rows, caption, note
        self.columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        places = {column: digits if isinstance(digits, int) else digits.get(column, 3) for column in self.columns}
        self.cells = {
            row: {column: written(line.get(column), places[column]) for column in self.columns}
            for row, line in rows.items()
        }
        self.marks = dict.fromkeys(unresolved, UNRESOLVED)
        for column, choose in (best or {}).items():
            known = {row: middle(line[column]) for row, line in rows.items() if self.cells[row][column] != MISSING}
            self.marks[choose(known, key=known.__getitem__), column] = "*"

    @property
    def frame(self) -> "pd.DataFrame":
        """The values as they were given, as a `pandas.DataFrame`."""
        import pandas as pd  # here, since nothing else in the package needs it

        values = [[line.get(column) for column in self.columns] for line in self.rows.values()]
        return pd.DataFrame(values, index=list(self.rows), columns=self.columns, dtype=object)

    def legend(self) -> str:
        """What the marks mean, and the note."""
        signs = {"*": "* best", UNRESOLVED: f"{UNRESOLVED} difference from the best not resolved"}
        used = "; ".join(words for sign, words in signs.items() if sign in self.marks.values())
        return ". ".join(filter(None, [used, self.note]))

    def __repr__(self) -> str:
        """The table as plain text."""
        columns = self.columns
        lines = [["", *columns]]
        lines += [[row, *(line[c] + self.marks.get((row, c), "") for c in columns)] for row, line in self.cells.items()]
        marked = [0, *(any((row, c) in self.marks for row in self.cells) for c in columns)]
        bare = [[cell.rstrip(f"*{UNRESOLVED}") for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*bare, strict=True)]
        text = [self.caption] if self.caption else []
        for line, plain in zip(lines, bare, strict=True):
            parts = [line[0].ljust(widths[0])]
            for cell, short, width, mark in zip(line[1:], plain[1:], widths[1:], marked[1:], strict=True):
                parts.append(" " * (width - len(short)) + cell + " " * (mark - (len(cell) - len(short))))
            text.append("  ".join(parts).rstrip())
        return "\n".join([*text, *filter(None, [self.legend()])])

    def _repr_html_(self) -> str:
        """The table as a page shows it."""
        heads = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in self.columns)
        body = ""
        for row, line in self.cells.items():
            cells = ""
            for column, cell in line.items():
                mark, shown = self.marks.get((row, column), ""), html.escape(cell)
                cells += f"<td><strong>{shown}</strong></td>" if mark == "*" else f"<td>{shown}{mark}</td>"
            body += f'<tr><th scope="row">{html.escape(row)}</th>{cells}</tr>\n'
        caption = f"<caption>{html.escape(self.caption)}</caption>\n" if self.caption else ""
        legend = self.legend().replace("* best", "bold: best")
        note = f"<p>{html.escape(legend)}</p>\n" if legend else ""
        table = f"<table>\n{caption}<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table>"
        return f'<div class="effens-table">\n{table}\n{note}</div>'


def written(value: Any, digits: int) -> str:
    """Return a value as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return str(value) if isinstance(value, str | int) else format(value, f"z.{digits}f")


def middle(value: Any) -> float:
    """Return the number by which a cell is compared: an interval's mean, or the number itself."""
    mean = getattr(value, "mean", value)
    return float(value if callable(mean) else mean)  # a tensor has a method of that name
