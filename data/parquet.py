"""Read the texts in a column of a Parquet file, with few of its rows in memory at once."""

from collections.abc import Iterator
from pathlib import Path

ROWS = 256  # read at a time
BUFFER = 2**20  # bytes of a column, read at a time
STRINGS = ("string", "large_string", "string_view")  # what Arrow calls the types of a text
COLUMN = "text"  # the column that is read by default


def read_rows(path: Path, column: str) -> Iterator[str]:
    """Yield the texts in a column of a Parquet file; a null is none."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
        from pyarrow.types import is_dictionary
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is missing: pip install pyarrow") from None
    try:
        # Without these settings the whole of a row group is in memory, which may be the whole file
        with ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
            fields = [(field.name, field.type) for field in file.schema_arrow]
            # A dictionary numbers its values, which may be texts
            types = {name: str(t.value_type if is_dictionary(t) else t) for name, t in fields}
            name = choose_column(path, types, column)
            for batch in file.iter_batches(ROWS, columns=[name], use_threads=False):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} has a text that is not UTF-8 ({error.reason}): convert it or leave it out"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error


def choose_column(path: Path, types: dict[str, str], asked: str) -> str:
    """Return the column asked for, or the only one of text. Raises ValueError if there is none."""
    texts = [name for name, type_ in types.items() if type_ in STRINGS]
    if asked in texts:
        return asked
    if asked == COLUMN and len(texts) == 1:
        return texts[0]
    if texts:
        names = ", ".join(texts)
        raise ValueError(f"{path} has no text in a column {asked}: name one of {names} by --column")
    columns = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
    raise ValueError(
        f"{path} must have a column of strings: got {columns}; convert one or leave the file out"
    )
