"""From files to documents: which files, how they are unpacked, where text is cut, and what is said of what cannot be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from keepstep.trainer import formats
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.formats import Document, Wanted, decoded, documents, pieces
from keepstep.trainer.sources import chunks, find_source

KEY = "data.source = 'x'"
ROWS = [{"text": f"row {i}\nof many", "prompt": f"p{i}", "completion": f"c{i}", "label": i % 3} for i in range(600)]


def wanted(objective: str = "next-token", field: str = "text") -> Wanted:
    return Wanted.of(TrainerConfig.model_validate({"data": {"text_field": field}, "train": {"objective": objective}}))


def read(path: Path, want: Wanted | None = None) -> list[Document]:
    source = find_source(str(path), KEY)
    return [document for file in source.files for document in documents(source, file, want or wanted())]


def texts(path: Path) -> list[str]:
    return [document.texts[0] for document in read(path)]


class TestFiles:
    def test_those_of_a_folder_come_by_name_hidden_ones_excepted(self, tmp_path: Path) -> None:
        for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden", ".git/x", "b/.y"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        source = find_source(str(tmp_path), KEY)
        assert [(file.name, file.num_bytes) for file in source.files] == [("a.txt", 5), ("b/1.txt", 7), ("b/2.txt", 7)]
        assert texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]

    def test_a_file_that_changes_changes_the_fingerprint(self, tmp_path: Path) -> None:
        import os

        path = tmp_path / "a.txt"
        path.write_text("one")
        first = find_source(str(path), KEY).fingerprint
        assert find_source(str(path), KEY).fingerprint == first
        path.write_text("two")
        os.utime(path, (1, 1))
        assert find_source(str(path), KEY).fingerprint != first

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda path: None, "does not exist; name a file"),
            (lambda path: path.mkdir(), "is an empty folder; name a file"),
            (lambda path: (path.mkdir(), (path / ".x").write_text("x")), "holds hidden files only; name a file"),
        ],
    )
    def test_a_source_without_files_is_named(self, tmp_path: Path, make: Callable[[Path], Any], says: str) -> None:
        make(tmp_path / "source")
        with pytest.raises(ValueError, match=f"^{KEY} {says}"):
            find_source(str(tmp_path / "source"), KEY)

    @pytest.mark.parametrize("source", ["", " "])
    def test_a_source_without_a_name_is_not_the_current_folder(self, source: str) -> None:
        with pytest.raises(ValueError, match=r"data.sources\[1\] is empty; name a file"):
            find_source(source, "data.sources[1]")

    def test_a_protocol_without_a_library_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"data.source = 'x' cannot be read: Protocol not known: nosuch"):
            find_source("nosuch://x", KEY)


class TestPacked:
    BODY = "".join(f"Line {i} of a text that packs well.\n" for i in range(3000)).encode()

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_it_is_what_was_packed_also_in_several_pieces(self, tmp_path: Path, ending: str) -> None:
        pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[ending]
        body = pack(self.BODY[:50_000]) + pack(self.BODY[50_000:])
        path = tmp_path / f"a.txt.{ending}"
        path.write_bytes(body)
        source, seen = find_source(str(path), KEY), []
        assert b"".join(chunks(source, source.files[0], seen.append)) == self.BODY
        assert sum(seen) == len(body)
        assert "".join(texts(path)) == self.BODY.decode()

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    @pytest.mark.parametrize("harm", ["cut", "spoilt"])
    def test_a_damaged_file_is_named(self, tmp_path: Path, ending: str, harm: str) -> None:
        pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
        body = bytearray(pack(self.BODY))
        if harm == "cut":
            del body[-20:]
        else:
            body[len(body) // 2] ^= 255
        path = tmp_path / f"a.txt.{ending}"
        path.write_bytes(body)
        with pytest.raises(ValueError, match=rf"^{KEY}: a\.txt\.{ending} cannot be read: .*put it right or take it out"):
            read(path)


def as_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return path


def as_parquet(path: Path) -> Path:
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=250)
    return path


@pytest.fixture(params=["jsonl", "parquet", "jsonl.gz"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"a.{request.param}"
    if request.param == "parquet":
        return as_parquet(path)
    as_jsonl(path)
    if request.param.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


class TestRecords:
    def test_each_is_a_document(self, records: Path) -> None:
        found = read(records)
        assert [document.texts for document in found] == [(row["text"],) for row in ROWS]
        assert len({document.name for document in found}) == len(ROWS)

    def test_pairs_and_labels_are_read_from_their_fields(self, records: Path) -> None:
        assert [document.texts for document in read(records, wanted("pairs"))] == [(row["prompt"], row["completion"]) for row in ROWS]
        assert [document.label for document in read(records, wanted("classes"))] == [str(row["label"]) for row in ROWS]

    def test_a_missing_field_is_named_with_those_that_are_there(self, records: Path) -> None:
        with pytest.raises(
            ValueError, match=r'has no (field|column) "body"; its (field|column)s are "text", "prompt", .*: set data\.text_field to one of'
        ):
            read(records, wanted(field="body"))

    def test_a_field_that_is_no_text_is_named(self, records: Path) -> None:
        with pytest.raises(ValueError, match=r'a\..*: (line|row) 1: "label" is int, not text; data\.text_field'):
            read(records, wanted(field="label"))

    def test_nothing_is_an_empty_document(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": null}\n\n{"text": "x"}')
        assert [document.has_text for document in read(path)] == [False, False, True]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('\ufeff{"text": "x"}\n')
        (tmp_path / "b.txt").write_text("\ufeffhello")
        assert texts(tmp_path) == ["x", "hello"]


class TestBadRecords:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", r"line 2 is no JSON \(.*\); each line must be one JSON object"),
            ("[1]", "line 2 is no JSON object; each line must be one"),
            ("[" * 100_000, r"line 2 is no JSON"),
            ('{"text": true}', r'line 2: "text" is bool, not text'),
            ('{"txt": "x"}', r'line 2 has no field "text"; its fields are "txt": set data\.text_field to one of these'),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, says: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"text": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"^{KEY}: a.jsonl: {says}"):
            read(path)

    def test_bytes_that_are_no_utf8_are_named_by_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
        with pytest.raises(ValueError, match=r"line 2 is not UTF-8 text \(byte 10 of the line\); convert"):
            read(tmp_path)

    def test_a_line_that_is_no_document_is_not_read_to_its_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "MAX_LINE_BYTES", 2 << 20)
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + b"x" * (9 << 20))
        with pytest.raises(ValueError, match=r"line 2 is longer than 2 MiB; cut that document into several, or is it not JSONL"):
            read(tmp_path)

    def test_a_label_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x", "label": " "}\n')
        with pytest.raises(ValueError, match=r'line 1: "label" is empty; give each document its class, or take it out'):
            read(tmp_path, wanted("classes"))

    @pytest.mark.parametrize("label", ["1.5", "null", "true", "[]"])
    def test_a_label_is_text_or_an_integer(self, tmp_path: Path, label: str) -> None:
        (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "label": {label}}}\n')
        with pytest.raises(ValueError, match=r'line 1: "label" is .*; a label is text or an integer'):
            read(tmp_path, wanted("classes"))

    def test_plain_text_has_no_fields(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match=r'a\.txt is plain text, and train\.objective = "pairs" reads the fields "prompt" and "comp'):
            read(tmp_path, wanted("pairs"))

    def test_what_is_called_parquet_and_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
        with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file, or a damaged one \(.*\); put it right or take it out"):
            read(tmp_path)

    def test_packed_parquet_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"x"))
        with pytest.raises(ValueError, match=r"a Parquet file is packed inside, .*; unpack it"):
            read(tmp_path)


def in_parts(body: str, sizes: list[int]) -> Iterator[str]:
    """The body in parts of these sizes, again and again."""
    start = turn = 0
    while start < len(body):
        size = sizes[turn % len(sizes)]
        yield body[start : start + size]
        start, turn = start + size, turn + 1


class TestPieces:
    @given(body=st.text(alphabet="ab \n\r\u0301\x85", max_size=400), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5))
    def test_they_make_the_text_and_do_not_depend_on_how_it_comes(self, body: str, sizes: list[int]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "_MIN_PIECE_CHARS", 20)
            patch.setattr(formats, "_MAX_PIECE_CHARS", 40)
            patch.setattr(formats, "_NEARBY_CHARS", 8)
            found = list(pieces(in_parts(body, sizes)))
            assert "".join(found) == body
            assert found == list(pieces([body] if body else []))
            assert all(0 < len(piece) <= 40 for piece in found)

    def test_they_end_at_blank_lines(self) -> None:
        body = "".join(f"line {i} of a book\n" + "\n" * (i % 7 == 0) for i in range(5000))
        found = list(pieces([body]))
        assert all(piece.endswith("\n\n") and 8 << 10 <= len(piece) < 9 << 10 for piece in found[:-1])

    def test_a_line_without_end_is_cut_at_spaces(self) -> None:
        found = list(pieces(in_parts("words " * 100_000, [1 << 20])))
        assert all(piece.endswith(" ") and 63 << 10 <= len(piece) <= 64 << 10 for piece in found[:-1])

    def test_and_anywhere_where_there_are_none_but_not_before_an_accent(self) -> None:
        body = "x" * (65536 - 1) + "e\u0301\u0323" + "x" * 10
        assert list(pieces([body])) == ["x" * 65535, "e\u0301\u0323" + "x" * 10]
        assert [len(piece) for piece in pieces(["x" * 200_000])] == [65536, 65536, 65536, 200_000 - 3 * 65536]


class TestDecoding:
    @given(body=st.text(max_size=60), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=4))
    def test_characters_that_come_in_parts_are_whole(self, body: str, cuts: list[int]) -> None:
        whole = body.encode()
        parts, start = [], 0
        while start < len(whole):
            parts.append(whole[start : start + cuts[len(parts) % len(cuts)]])
            start += len(parts[-1])
        assert "".join(decoded(parts, "x")) == body.removeprefix("\ufeff")

    @pytest.mark.parametrize("size", [1, 3, 100])
    def test_the_first_wrong_byte_is_named(self, size: int) -> None:
        body = "täxt".encode() * 5 + b"\xff" + b"more"
        with pytest.raises(ValueError, match=r"^x is not UTF-8 text \(byte 25\); convert it or take it out"):
            list(decoded([body[i : i + size] for i in range(0, len(body), size)], "x"))

    def test_a_character_that_is_cut_off_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"\(byte 1\)"):
            list(decoded([b"x\xc3"], "x"))
