"""Records of parquet files, a batch of rows in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError, first_cause
from data.readers.files import BLOCK_BYTES, not_found, read_blocks, split_suffix

ROWS_AT_ONCE = 256


def read_parquet(path: str | Path) -> Iterator[dict]:
    """The rows of a parquet file. Raises UserError for a file that is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    if not path.exists():
        raise not_found(path)
    try:
        with _seekable(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a complete parquet file ({first_cause(error)}); download it again") from error


def _seekable(path: Path) -> BinaryIO:
    """A file to seek in, decompressed: parquet is read from its end, which a compressed stream does not allow."""
    if split_suffix(path)[1] is None:
        return open(path, "rb")  # noqa: PTH123
    file = tempfile.TemporaryFile()  # noqa: SIM115
    for block in read_blocks(path):
        file.write(block)
    file.seek(0)
    return file
