"""Files of records: what a line holds, what is said of one that holds nothing, and of files that cannot be read."""

import codecs
import datetime
import gzip
import itertools
import json
import re
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megatron_core_impl.data import text_files
from megatron_core_impl.data.records import MalformedRecord
from megatron_core_impl.data.text_encoder import text_of
from megatron_core_impl.data.text_files import Row, SourceFile, UnreadableFile, open_reader, part_bytes, record_of


def rows(path: Path, size: int = 1 << 20, columns: tuple[str, ...] = ("text",), readers: int = 1) -> list[Row]:
    """All rows of a file, part by part, by several that take turns."""
    opened = [open_reader(SourceFile(path, path.name), size, columns, columns[:1]) for _ in range(readers)]
    found: list[Row] = []
    for part in itertools.count():
        blocks = opened[part % readers].blocks(part)
        if blocks is None:
            break
        found += itertools.chain.from_iterable(blocks)
    for reader in opened:
        reader.close()
    return found


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst"])
def test_parts_give_each_line_once(tmp_path: Path, suffix: str, size: int, ending: bytes) -> None:
    content = b'{"a": 1}\n\n{"b":\r2}\r\n' + '{"c": "\u2028"}\n'.encode() + b'{"d": "much longer than the others"}\n{}' + ending
    compress = {"gz": gzip.compress, "zst": zstd.compress}.get(suffix.split(".")[-1], bytes)
    (tmp_path / f"data.{suffix}").write_bytes(compress(content))
    expected: list[Row] = [{"a": 1}, None, {"b": 2}, {"c": "\u2028"}, {"d": "much longer than the others"}, {}]
    for readers in (1, 3):
        assert rows(tmp_path / f"data.{suffix}", size, readers=readers) == expected + [None] * (len(ending) - 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'["text"]', "an array, not an object"),
        (b"null", "null, not an object"),
        (b"3", "a number, not an object"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b'{"text": "a\0"}', "not JSON: Invalid control character at column 12"),
        (b"[" * 100_000, "not readable JSON: maximum recursion depth exceeded"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable JSON: Exceeds the limit"),
        (b'{"id": 1, "content": "a"}', 'no key "text"; it has: id, content'),
        (b'{"text": null}', '"text" is null, not a string'),
        (b'{"text": true}', '"text" is true or false, not a string'),
        (b'{"text": {"a": 1}}', '"text" is an object, not a string'),
        (b'{"text": "a\\ud83d"}', r'"text" is no valid Unicode: \ud83d at character 2 is half of a surrogate pair'),
    ],
)
def test_malformed_line_has_a_reason(line: bytes, reason: str) -> None:
    found = record_of(line)
    if isinstance(found, dict):
        with pytest.raises(MalformedRecord) as error:
            text_of(found, "text")
        found = error.value
    assert str(found).startswith(reason)


def test_line_gives_its_text() -> None:
    record = record_of('{"id": 1, "text": "é\\ud83d\\ude00\\u2028", "n": NaN}\r'.encode())
    assert isinstance(record, dict)
    assert text_of(record, "text") == "é😀\u2028"
    assert record_of(b"") is record_of(b" \t\r") is None


ARRAY = [{"text": "a, [b] é"}, {"text": "much longer than the others", "n": [{}, 1]}, 12, {"text": ""}]


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("suffix", ["json", "json.gz", "json.zst"])
def test_array_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, block: int, size: int) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    compress = {"gz": gzip.compress, "zst": zstd.compress}.get(suffix.split(".")[-1], bytes)
    for indent, mark in ((None, ""), (2, "\ufeff\n ")):
        written = mark + json.dumps(ARRAY, ensure_ascii=False, indent=indent) + "\n"
        (tmp_path / f"data.{suffix}").write_bytes(compress(written.encode()))
        for readers in (1, 3):
            found = rows(tmp_path / f"data.{suffix}", size, readers=readers)
            assert [str(row) if isinstance(row, MalformedRecord) else row for row in found] == [
                *ARRAY[:2], "a number, not an object", ARRAY[3],
            ]  # fmt: skip


def test_json_file_of_lines_or_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    for content, expected in (
        (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]), (b"[]", []), (b" [ ]\n", []), (b"", []),
    ):  # fmt: skip
        file.write_bytes(content)
        assert rows(file) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "ends early, in the middle of its array: it was cut off. Fetch it again"),
        (b'[{"a": 1}', "ends early, in the middle of its array"),
        (b'[{"a": 1},', "ends early, in the middle of its array"),
        (b'[{"a": 1}, {"a": "b', "ends early, in the middle of its array"),
        (b'[{"a": 1}, {"a": ', "ends early, in the middle of its array"),
        (b'[{"a": 1}, {"a" 2}]', "record 2 of its array is not JSON: Expecting ':' delimiter. Mend it, or write one JSON "),
        (b'[{"a": 1} {"a": 2}]', "a comma or the closing bracket must follow record 1 of its array, not '{'. Mend it"),
        (b'[{"a": 1}] {"a": 2}', "its array ends, and something follows. Mend it"),
        (b"[" * 100_000, "record 1 of its array is no readable JSON: maximum recursion depth exceeded"),
    ],
)
def test_damaged_array(tmp_path: Path, content: bytes, message: str) -> None:
    assert refusal(tmp_path / "data.json", content).startswith(f"data.json: {message}")


def test_array_whose_end_is_not_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10)
    monkeypatch.setattr(text_files, "ELEMENT_CHARACTERS", 1000)
    error = refusal(tmp_path / "data.json", b'[{"a": 1}, {"a: 2}, ' + b'{"a: 3}, ' * 10_000 + b"]")
    assert error.startswith("data.json: record 2 of its array is not JSON: ")


def test_text_of_an_array_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"text": "a\xff"}, {"text": "b"}]')
    first, second = rows(tmp_path / "data.json")
    assert second == {"text": "b"}
    assert isinstance(first, dict)
    with pytest.raises(MalformedRecord, match=r'"text" is no valid Unicode: \\udcff at character 2'):
        text_of(first, "text")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    content = codecs.BOM_UTF8 + b'{"a": 1}\n' + codecs.BOM_UTF8 + b'{"a": 2}\n'
    (tmp_path / f"data.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    for size in (1, 1000):
        first, second = rows(tmp_path / f"data.{suffix}", size)
        assert first == {"a": 1}
        assert str(second) == "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1", "at the beginning only"


def test_values_of_parquet_have_names() -> None:
    for value, name in ((b"a", "binary"), (datetime.date(2000, 1, 1), "a date"), (Decimal(1), "a Decimal"), (1.5, "a number")):
        with pytest.raises(MalformedRecord, match=f'"text" is {name}, not a string'):
            text_of({"text": value}, "text")


def refusal(path: Path, content: bytes, size: int = 1 << 20) -> str:
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as error:
        rows(path, size)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_file_that_ends_early_or_is_none(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(20_000))
    whole = {"gz": gzip.compress, "zst": zstd.compress}[suffix](content)
    file = tmp_path / f"data.jsonl.{suffix}"
    early = f"data.jsonl.{suffix}: ends early, in the middle of its compressed data: it was cut off. Fetch it again"
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        assert refusal(file, whole[:cut], size=1000) == early, cut
    # A zstd file need not have a checksum, so damage inside may go unseen.
    for damaged in (b"text, not compressed at all", *([whole[:500] + b"\0" * 200 + whole[700:]] if suffix == "gz" else [])):
        assert refusal(file, damaged).startswith(f"data.jsonl.{suffix}: is damaged, or not compressed as its name says: ")
    file.write_bytes(whole)
    assert len(rows(file, size=1000)) == 20_000


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    table = pyarrow.table({"id": [1, 2, 3], "text": ["a", None, "c"], "more": [[{"x": 1}], [], [{"x": 2}]]})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    assert rows(file) == [{"text": "a"}, {"text": None}, {"text": "c"}]
    assert rows(file, columns=("more", "absent")) == [{"more": [{"x": 1}]}, {"more": []}, {"more": [{"x": 2}]}]
    whole = file.read_bytes()
    with pytest.raises(UnreadableFile, match=re.escape("data.parquet: has no column 'content'; it has: id, text, more")):
        rows(file, columns=("content",))
    assert refusal(file, b"").startswith("data.parquet: is no parquet file that can be read: it is empty")
    for damaged in (whole[:-20], b"text"):
        assert refusal(file, damaged).startswith("data.parquet: is no parquet file that can be read: ")


def test_text_of_parquet_that_is_no_utf_8(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "data.parquet")
    first, second, third = rows(tmp_path / "data.parquet")
    assert (first, third) == ({"text": "a"}, {"text": "c"})
    assert str(second) == "not UTF-8: byte 0xff at byte 2 of a text"


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "data.csv", b"") == (
        "data.csv: is of no kind that can be read; those are .jsonl, .ndjson, .json, .jsonl.gz, .ndjson.gz, .json.gz, "
        ".jsonl.zst, .ndjson.zst, .json.zst, .parquet"
    )
    assert rows_of_empty(tmp_path) == []


def rows_of_empty(folder: Path) -> list[Row]:
    (folder / "empty.jsonl").write_bytes(b"")
    return rows(folder / "empty.jsonl")


def test_size_of_parts_follows_from_the_files(tmp_path: Path) -> None:
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    for file, size in ((small, 10), (large, 1 << 33)):
        with file.open("wb") as sparse:
            sparse.truncate(size)
    assert part_bytes((SourceFile(small, ""),)) == 1 << 20
    assert part_bytes((SourceFile(small, ""), SourceFile(large, ""))) == 1 << 22
