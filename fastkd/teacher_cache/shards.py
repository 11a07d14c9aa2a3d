"""One shard on disk: a Parquet file with one row group, a row for each sequence, and metadata of its own."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.teacher_cache.encoding import Columns, Errors
from fastkd.teacher_cache.meta import FORMAT, CacheError, Meta
from fastkd.teacher_cache.rows import id_dtype

KEY = b"fastkd.teacher_cache"
SUM = b"fastkd.teacher_cache.crc32"  # of what is stored under KEY: Parquet has checksums of pages only
NAME = re.compile(r"shard-(\d{5,})\.parquet")
MAGIC = b"PAR1"
VALUES = {"fp16": np.float16, "fp32": np.float32, "int8": np.uint8}
PER_ENTRY = ("ids", "log_probs", "weights")


@dataclass(frozen=True)
class Shard:
    """What the footer of a file says."""

    path: Path
    meta: Meta
    first: int  # sequences in the shards before
    sequences: int
    tokens: int
    has_input_ids: bool
    errors: Errors
    encoded: dict[str, int]  # bytes of each column before compression
    compressed: dict[str, int]


def parquet() -> Any:
    """pyarrow.parquet, or one line that says how to get it."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ModuleNotFoundError(
            "fastkd.teacher_cache needs pyarrow; get it with: pip install 'fastkd[cache]'", name="pyarrow"
        ) from None
    return pyarrow.parquet


def column_dtypes(meta: Meta, has_input_ids: bool) -> dict[str, np.dtype]:
    """The list columns of a cache in their order, and the dtype of their values."""
    columns: dict[str, Any] = {"ids": id_dtype(meta.vocab)}
    if meta.kind == "samples":
        columns["weights"] = VALUES[meta.log_probs]
    else:
        columns |= {"log_probs": VALUES[meta.log_probs], "log_tail": np.float32}
    if meta.log_probs == "int8":
        columns |= {"scale": np.float32, "shift": np.float32}
    if has_input_ids:
        columns["input_ids"] = np.int32
    return {name: np.dtype(dtype) for name, dtype in columns.items()}


def _schema(dtypes: Mapping[str, np.dtype]) -> Any:
    """Nothing is ever null, which also makes reading faster."""
    import pyarrow as pa

    fields = [pa.field("tokens", pa.int32(), nullable=False)]
    for name, dtype in dtypes.items():
        element = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        fields.append(pa.field(name, pa.list_(element), nullable=False))
    return pa.schema(fields)


def write(
    path: Path, meta: Meta, first: int, lengths: np.ndarray, columns: Columns, errors: Errors, codec: str
) -> None:
    """Writes a whole file, not yet safe on disk. ``lengths`` [sequences]; a column is [tokens] or [tokens, K]."""
    pq = parquet()
    import pyarrow as pa

    dtypes = {name: values.dtype for name, values in columns.items()}
    schema = _schema(dtypes)
    facts = {"first": first, "sequences": len(lengths), "tokens": int(lengths.sum()), "errors": errors}
    content = json.dumps({"format": FORMAT, **meta.to_dict(), **facts}).encode()
    schema = schema.with_metadata({KEY: content, SUM: str(zlib.crc32(content))})
    arrays = [pa.array(lengths, pa.int32())]
    for field in list(schema)[1:]:
        values = columns[field.name]
        offsets = np.append(0, np.cumsum(lengths)) * (values.size // max(len(values), 1))
        flat = pa.array(values.reshape(-1))
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=field.type))

    # a dictionary packs integers into as many bits as they need; floats compress best byte by byte
    floats = [name for name, dtype in dtypes.items() if dtype.kind == "f"]
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema),
        path,
        row_group_size=max(len(lengths), 1),
        compression=codec,
        compression_level=3 if codec == "zstd" else None,
        use_dictionary=[f"{name}.list.element" for name in dtypes if name not in floats],
        dictionary_pagesize_limit=2**26,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats},
        write_statistics=False,
        write_page_checksum=True,
    )


def footer(path: Path) -> Shard:
    """What the file says about itself; an error that names it and the reason if it is no whole shard."""
    pq = parquet()
    _is_whole(path)
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            found, layout = file.metadata, file.schema_arrow
            groups = [found.row_group(i) for i in range(found.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            names = [column.path_in_schema.partition(".")[0] for column in columns]
    except _failures() as error:
        raise CacheError(f"{path}: its Parquet footer cannot be read: {_first_line(error)}") from None
    meta, facts = _parse(path, found.metadata or {})
    has_input_ids = "input_ids" in layout.names
    expected = _schema(column_dtypes(meta, has_input_ids))
    if not layout.equals(expected) or names != layout.names:
        raise CacheError(f"{path}: its metadata ask for the columns {_names(expected)}, got {_names(layout)}")
    if len(groups) != 1 or found.num_rows != facts["sequences"]:
        came = f"{len(groups)} row groups with {found.num_rows} rows"
        raise CacheError(f"{path}: expected one row group with {facts['sequences']} rows, got {came}")
    return Shard(
        path=path,
        meta=meta,
        **facts,
        has_input_ids=has_input_ids,
        encoded={name: column.total_uncompressed_size for name, column in zip(names, columns)},
        compressed={name: column.total_compressed_size for name, column in zip(names, columns)},
    )


def _parse(path: Path, stored: Mapping[bytes, bytes]) -> tuple[Meta, dict[str, Any]]:
    """Meta, and the fields of Shard that the metadata hold."""
    if KEY not in stored:
        raise CacheError(
            f"{path}: a Parquet file, but no shard of a teacher cache: it has no metadata {KEY.decode()!r}"
        )
    if stored.get(SUM) != str(zlib.crc32(stored[KEY])).encode():
        raise CacheError(f"{path}: its metadata are damaged: they do not have the checksum {stored.get(SUM)!r}")
    try:
        content = json.loads(stored[KEY])
        if content["format"] == FORMAT:
            facts: dict[str, Any] = {name: int(content[name]) for name in ("first", "sequences", "tokens")}
            facts["errors"] = {str(name): float(value) for name, value in content["errors"].items()}
            return Meta.from_dict(content), facts
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"{path}: its metadata {KEY.decode()!r} cannot be read: {error!r}") from None
    raise CacheError(f"{path}: format {content['format']} of the teacher cache; this fastkd reads {FORMAT}")


def read(shard: Shard) -> tuple[np.ndarray, Columns]:
    """Where each sequence begins [sequences + 1], in tokens, and the columns, [tokens, K] for those per entry."""
    try:
        with parquet().ParquetFile(shard.path, memory_map=True, page_checksum_verification=True) as file:
            table = file.read_row_group(0, use_threads=False)
    except _failures() as error:
        raise CacheError(f"{shard.path}: its pages cannot be read: {_first_line(error)}") from None
    starts = np.append(0, np.cumsum(table.column("tokens").to_numpy(), dtype=np.int64))
    if starts[-1] != shard.tokens or (np.diff(starts) < 0).any():
        raise CacheError(f"{shard.path}: expected {shard.tokens} tokens in its sequences, got {starts[-1]}")
    columns: Columns = {}
    for name in table.column_names[1:]:
        lists = table.column(name).combine_chunks()
        width = shard.meta.k if name in PER_ENTRY else 1
        if not np.array_equal(lists.offsets.to_numpy(), starts * width):
            raise CacheError(f"{shard.path}: lists in the column {name!r} do not have {width} values a token")
        flat = lists.values.to_numpy()
        columns[name] = flat.reshape(-1, width) if name in PER_ENTRY else flat
    return starts, columns


def scan(folder: Path) -> list[Shard]:
    """All shards of a folder in order, held against each other; [] if there is none."""
    parquet()  # before any file is looked for
    if not folder.is_dir():
        raise CacheError(f"{folder}: no such folder")
    shards: list[Shard] = []
    for path in paths(folder):
        shard = footer(path)
        if shards:
            _follows(shards[-1], shard)
        elif shard.first:
            raise CacheError(f"{path}: begins with sequence {shard.first}, expected 0: shards before it are missing")
        shards.append(shard)
    return shards


def paths(folder: Path) -> list[Path]:
    """The files of the shards in order."""
    numbers = {}
    for path in folder.glob("[!.]*.parquet"):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise CacheError(f"{path}: no shard of a teacher cache: those are named {path_of(folder, 0).name}")
        numbers[int(name[1])] = path
    for expected, number in enumerate(sorted(numbers)):
        if number != expected:
            raise CacheError(f"{path_of(folder, expected)}: missing, though {numbers[number].name} is there")
    return [numbers[number] for number in sorted(numbers)]


def path_of(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.parquet"


def _follows(before: Shard, shard: Shard) -> None:
    difference = before.meta.difference(shard.meta)
    if difference is None and before.has_input_ids != shard.has_input_ids:
        difference = "one has input_ids"
    if difference is not None:
        raise CacheError(f"{shard.path}: from another cache than {before.path.name}: {difference}")
    expected = before.first + before.sequences
    if shard.first != expected:
        raise CacheError(f"{shard.path}: begins with sequence {shard.first}, expected {expected}: from another cache")


def _is_whole(path: Path) -> None:
    """The marks at both ends of a Parquet file."""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 4, 0))
            end = file.read(4)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}") from None
    if begin != MAGIC:
        what = "an empty file" if size == 0 else "no Parquet file" if size >= 4 else "cut short"
        raise CacheError(f"{path}: {what}: it must begin with {MAGIC!r}, got {begin!r}")
    if end != MAGIC or size < 12:
        raise CacheError(f"{path}: cut short: a Parquet file ends with {MAGIC!r}, got {end!r} after {size} bytes")


def _failures() -> tuple[type[BaseException], ...]:
    """What pyarrow raises at bytes that are no Parquet; its own are ValueErrors and the like, too."""
    import pyarrow as pa

    return pa.ArrowException, OSError, ValueError, MemoryError, TypeError, KeyError


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _names(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
