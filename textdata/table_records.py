"""
Read the rows of .csv and .parquet files as records.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator

from textdata.records import text_fields

MAX_LINE = 2**26  # characters of a line, and of a field, of a .csv file
ROWS_AT_ONCE = 256  # rows of a .parquet file in memory


def read_csv(blocks: Iterable[str], text_field: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a .csv file with a header as records. text_field: as of record_text.

    Raises ValueError for a row that does not fit the header, or is not CSV, and for two columns
    with the text.
    """
    csv.field_size_limit(MAX_LINE)
    rows = csv.reader(split_lines(blocks), strict=True)
    header: list[str] = []
    try:
        for row in rows:
            if not row:  # an empty line
                continue
            if not header:
                header = row
                check_columns(header, text_field)
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {rows.line_num:,}: the row has {len(row)} field(s), the header "
                    f"{len(header)}; a text with a comma must be in double quotes"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"line {rows.line_num:,}: not CSV ({error}); a double quote may be missing"
        ) from error


def check_columns(names: list[str], text_field: str) -> None:
    """Raise ValueError if several columns have the name of the text. A record has one of them."""
    for name in text_fields(text_field):
        if names.count(name) > 1:
            raise ValueError(
                f'{names.count(name)} columns have the name "{name}"; rename all but one of them'
            )


def split_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the lines with their ends. Only \\n ends a line. Raises ValueError for a line that is
    too long."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) > MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE:,} characters")
    if rest:
        yield rest


def read_parquet(
    path: str, progress: Callable[[int], None], text_field: str
) -> Iterator[dict[str, object]]:
    """Yield the rows of a .parquet file as records that have the fields for the text only.

    Args:
        path: the file.
        progress: called with the bytes of the file that the rows read so far take on average.
        text_field: as of record_text.

    Raises ValueError if the file is damaged or two columns have the text, ImportError if pyarrow is
    not installed.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(names, text_field)
            columns = [name for name in text_fields(text_field) if name in names]
            num_rows = 0
            # Without a column for the text, all columns are shown in the error message.
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns or names):
                num_rows += batch.num_rows
                yield from batch.to_pylist()
                progress(os.path.getsize(path) * num_rows // file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"not a whole Parquet file: {reason}") from error
