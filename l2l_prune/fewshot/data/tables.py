"""Parquet and arrow tables of pictures, as data hubs store them; read with pyarrow."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2l_prune.fewshot.data.pictures import Picture, note_file, shown

TABLES = (".parquet", ".arrow")
_ROWS = 256


@dataclass(frozen=True)
class Table:
    """The rows of some files.

    They have a column ``image`` with bytes, or with structs of bytes and path, and a column
    ``label`` with whole numbers or text.

    Args:
        files: Parquet or arrow files, in order.
        root: The folder to which paths in the structs are relative.
    """

    files: tuple[Path, ...]
    root: Path

    def survey(self, digest: Any, seen: Any) -> Counter[str]:
        """Number of rows in each class.

        Names, sizes and times of the files update ``digest``, and those of pictures that they only
        name.

        Args:
            digest: The hash.
            seen: Not used, since rows hold their pictures.

        Raises:
            ValueError: If a file is damaged or lacks these columns; the message names it.
            ImportError: If pyarrow is missing.
        """
        counts: Counter[str] = Counter()
        for file in self.files:
            note_file(digest, file, file.name)
            with _telling(file):
                for batch in _batches(file, ["label", "image.path"]):
                    counts.update(_labels(batch))
                    for path in _paths(batch):
                        place = os.path.join(self.root, path)
                        if os.path.isfile(place):  # where the table has the bytes, it may be gone
                            note_file(digest, place, path)
        return counts

    def pictures(self) -> Iterator[Picture]:
        """All rows in order.

        Raises:
            ValueError: If a row has no image, or a file is damaged; the message names it.
        """
        for file in self.files:
            row = 0
            with _telling(file):
                for batch in _batches(file, ["image", "label"]):
                    images = batch.column("image").to_pylist()
                    for image, label in zip(images, _labels(batch), strict=True):
                        yield Picture(f"{shown(file)}, row {row}", label, self._content(image, row))
                        row += 1

    def _content(self, image: Any, row: int) -> str | bytes:
        if isinstance(image, dict):
            path = image.get("path")
            content = image.get("bytes")
            image = os.path.join(self.root, path) if content is None and path else content
        if image is None:
            raise ValueError(f"row {row} has no image")
        return image  # type: ignore[no-any-return]


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    """Record batches of a few rows, with some of the columns; ``image.path`` if it is there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as opened:
            _check_columns(opened.schema_arrow)
            for batch in opened.iter_batches(_ROWS, columns=columns, use_threads=False):
                yield batch.replace_schema_metadata(opened.schema_arrow.metadata)
        return
    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # a stream, as the hubs' "save to disk" writes it
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped)
            batches = iter(reader)
        _check_columns(reader.schema)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                part = batch.slice(start, _ROWS).select([c.partition(".")[0] for c in columns])
                yield part.replace_schema_metadata(reader.schema.metadata)


def _paths(batch: Any) -> Iterator[str]:
    """Paths of pictures, where the table has any."""
    import pyarrow as pa

    kind = batch.schema.field("image").type if "image" in batch.schema.names else pa.null()
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        yield from filter(None, batch.column("image").field("path").to_pylist())


def _check_columns(schema: Any) -> None:
    import pyarrow as pa

    for name in ("image", "label"):
        if schema.get_field_index(name) < 0:  # also where it is there twice
            raise ValueError(
                f"it must have exactly one column {name}, but it has {', '.join(schema.names)}"
            )
    image, label = schema.field("image").type, schema.field("label").type
    if pa.types.is_struct(image):
        fields = {field.name: field.type for field in image}
        image = fields.get("bytes", pa.null())
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    if not any(is_kind(image) for is_kind in binary):
        raise ValueError(f"its column image must hold bytes, or structs of bytes, not {image}")
    if pa.types.is_dictionary(label):
        label = label.value_type
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(label) for is_kind in kinds):
        raise ValueError(f"its column label must hold whole numbers or text, not {label}")


def _labels(batch: Any) -> list[str]:
    labels = batch.column("label").to_pylist()
    if None in labels:
        raise ValueError("its column label has missing values")
    names = _class_names(batch.schema)
    return [
        names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)
        for label in labels
    ]


def _class_names(schema: Any) -> list[str]:
    """The names of the labels, if the table's metadata has them in the hubs' format."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    good = isinstance(names, list) and len(set(map(str, names))) == len(names)
    return [str(name) for name in names] if good else []


@contextmanager
def _telling(file: Path) -> Iterator[None]:
    """Errors of reading name the file."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{error}; tables need: pip install "l2l-prune[parquet]"') from None
    except MemoryError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's are of these kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{shown(file)} cannot be used as a table: {error}") from error
