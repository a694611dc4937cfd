"""CSV files and lists that people and spreadsheets write, read as text: nothing is guessed, and no row is lost.

UTF-8 with or without a byte order mark, any line ends, commas between cells, quotes round cells that hold commas or
line breaks. Rows without any text are left out; any other row that does not fit its header is refused by its line.
"""

import csv
import io
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

_MOST_BYTES = 2**30  # a table of images is never so large, and the whole file is held in memory
_LONGEST = 1_000  # characters of an id, a label or a path
_SHOWN = 20  # names in an error


def read(path, columns: Sequence[str], *, expected: str, mend: str = "", others: bool = False) -> pd.DataFrame:
    """Read columns of a CSV as text, without spaces round the cells.

    Args:
        path: CSV file.
        columns: those that are needed, in this order.
        expected: what the file should hold, for errors: "the columns id and label, and a row an image".
        mend: what to do where columns are absent ["name them so, or restore the file"].
        others: whether to return all columns that have a name, in the file's order.

    Returns:
        DataFrame of text, a row a row of the file that has any text; a blank cell is "".

    Raises:
        FileNotFoundError: no such file.
        ValueError: as of `read_rows`; a column absent, or there twice; a row of fewer cells than the header, or with
            text beyond it; a cell of over 1,000 characters in a needed column.
    """
    header, rows = read_rows(path, expected=expected)
    check_columns(path, header, columns, mend=mend)
    chosen = list(columns)
    if others:
        named = [name for name in header if name]
        twice = [name for name, count in Counter(named).items() if count > 1]
        if twice:
            raise ValueError(f"{path} has the columns {shown(twice)} twice; rename or remove one of each.")
        chosen = named
    width = max((place for place, name in enumerate(header, 1) if name), default=0)
    check_widths(path, rows, width, len(header))
    cells = {name: [row[place].strip() for row in rows] for name, place in zip(chosen, map(header.index, chosen))}
    for name in columns:
        check_length(path, name, cells[name])
    return pd.DataFrame({name: pd.array(values, dtype="str") for name, values in cells.items()}, columns=chosen)


def read_rows(path, *, expected: str) -> tuple[list[str], list[list[str]]]:
    """Read a CSV's cells, whatever its columns.

    Args:
        path: CSV file.
        expected: what the file should hold, for errors.

    Returns:
        The names of the columns, without spaces round them, and the rows that have any text, each a list of cells, as
        many as it has.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: it must not be read.
        ValueError: a folder, or no regular file; over 1 GiB; empty; not in UTF-8; with NUL bytes; a quote that is never
            closed, or a cell of over 131,072 characters; a row that repeats the header.
    """
    reader = csv.reader(io.StringIO(read_text(path, expected=expected), newline=""), strict=True)
    try:
        rows = [cells for cells in reader if cells and (cells[0].strip() or any(map(str.strip, cells)))]
    except csv.Error as error:
        raise ValueError(
            f"{path} is no readable CSV: line {reader.line_num}: {error}. Close every quote. Expected {expected}."
        ) from error
    if not rows:
        raise ValueError(f"{path} is empty; write {expected}.")
    header, *rows = rows
    header = [name.strip() for name in header]
    for row, cells in enumerate(rows):
        if header[0] in cells[0] and [cell.strip() for cell in cells] == header:
            raise ValueError(f"{path}, line {_lines(path)[row]}, repeats the line of column names; keep the first.")
    return header, rows


def _lines(path) -> list[int]:
    """Line in which each row of `read_rows` ends, from 1: read again, as only errors tell lines."""
    reader = csv.reader(io.StringIO(read_text(path, expected=""), newline=""), strict=True)
    return [reader.line_num for cells in reader if any(map(str.strip, cells))][1:]


def read_text(path, *, expected: str) -> str:
    """Read a text file of UTF-8, with or without a byte order mark; see `read_rows` for what is refused."""
    path = Path(path)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            what = "a folder" if stat.S_ISDIR(state.st_mode) else "no regular file"
            raise ValueError(f"{path} is {what}; put a file there, with {expected}.")
        if state.st_size > _MOST_BYTES:
            raise ValueError(f"{path} has {state.st_size:,} bytes; expected at most {_MOST_BYTES:,}. Is it the file?")
        content = path.read_bytes()
    except FileNotFoundError as error:
        link = f", a link to {os.readlink(path)} that is not there" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path} is absent{link}; expected {expected}.") from error
    except PermissionError as error:
        raise PermissionError(f"{path} must not be read by this user; allow it (chmod u+r).") from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is not in UTF-8 (it begins as UTF-16 does); save it as a CSV in UTF-8.")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise ValueError(
            f"{path} has {content.count(bytes(1)):,} NUL bytes, the first in line {line}: it is broken, or in UTF-16; "
            "get it again, or save it as a CSV in UTF-8."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(
            f"{path} is not in UTF-8 (byte {byte:#04x} in line {line}); save it as a CSV in UTF-8."
        ) from error


def check_columns(path, header: Sequence[str], columns: Sequence[str], *, mend: str = "") -> None:
    """Refuse a header that lacks columns, or has one of them twice."""
    absent = [name for name in columns if name not in header]
    if absent:
        others = [mark for mark in (";", "\t") if any(mark in name for name in header)]
        mend = f"separate columns by commas, not by {others[0]!r}" if others else mend
        raise ValueError(
            f"{path} lacks the columns {absent}; it has {shown(header)}: {mend or 'name them so, or restore the file'}."
        )
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has the columns {twice} twice; rename or remove one of each.")


def check_length(path, column: str, values: Sequence[str]) -> None:
    """Refuse cells that are too long for an id, a label or a path."""
    if max(map(len, values), default=0) > _LONGEST:
        row = next(row for row, value in enumerate(values) if len(value) > _LONGEST)
        raise ValueError(
            f"{path}, line {_lines(path)[row]}: a cell of {len(values[row]):,} characters in column {column}; expected "
            f"at most {_LONGEST:,}. Is a quote closed too late? It begins {values[row][:30]!r}."
        )


def check_widths(path, rows: Sequence[Sequence[str]], fewest: int, most: int) -> None:
    """Refuse rows of fewer cells than `fewest`, or with text beyond `most`: cut ones, or a comma without quotes."""
    wrong = [
        place
        for place, cells in enumerate(rows)
        if not fewest <= len(cells) <= most and (len(cells) < fewest or any(map(str.strip, cells[most:])))
    ]
    if wrong:
        lines = _lines(path)
        first = [f"line {lines[place]} has {len(rows[place])}" for place in wrong[:3]]
        raise ValueError(
            f"{path} is no readable CSV: {len(wrong)} of {len(rows)} rows have fewer than {fewest} cells, or more than "
            f"{most} ({', '.join(first)}). Complete a row that is cut off; put quotes round a cell with a comma."
        )


def shown(names: Sequence[str]) -> str:
    """Names for an error, as a list, without the last of many and the end of long ones."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{[name if len(name) <= 80 else f'{name[:80]}…' for name in names[:_SHOWN]]}{more}"
