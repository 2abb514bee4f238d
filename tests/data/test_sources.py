"""Documents from the built-in corpora and from local files, and every way in which a file can be wrong."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from kdjax.data import SOURCES, Document, read_documents
from kdjax.data.build_factbook import build, main

ROOM = Path(__file__).parents[2] / "kdjax" / "data"


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_gives_the_same_documents_each_time_under_unique_ids(name):
    documents, notes = read_documents(name)
    assert documents == read_documents(name)[0]
    assert notes == []
    assert len({document.id for document in documents}) == len(documents) >= 2
    assert all((document.text is None) != (document.messages is None) for document in documents)
    assert all(document.text or document.messages for document in documents)


def test_embedded_factbook_is_small_large_enough_and_clean():
    assert (ROOM / "factbook.jsonl.xz").stat().st_size < 1_500_000
    documents, _ = read_documents("factbook")
    assert len(documents) >= 250
    assert sum(len(document.text) for document in documents) > 2_000_000
    assert all(re.fullmatch(r"[a-z-]+/[a-z]{2}", document.id) for document in documents)
    text = "\n\n".join(document.text for document in documents)
    assert not re.search(r"</?[A-Za-z]|&#?\w+;|\ufffd|  |\t", text)
    assert min(map(len, text.split("\n\n"))) >= 200
    assert "France today is one of the most modern countries in the world" in text


def test_provenance_names_the_hash_of_the_shipped_file():
    provenance = (ROOM / "PROVENANCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256((ROOM / "factbook.jsonl.xz").read_bytes()).hexdigest() in provenance
    assert "public domain" in provenance


def test_build_factbook_walks_drops_tags_entities_short_broken_and_meta(tmp_path, capsys):
    prose = "word " * 50
    page = {
        "Intro": {"text": f"<p>Trade &amp; aid</p>  {prose}<br/>"},
        "List": [{"text": "short"}, {"deep": {"text": f"a < b {prose}", "note": {"text": None}}}],
        "Broken": {"text": f"\ufffd {prose}"},
        "text": {"text": f"nested {prose}"},
    }
    write(tmp_path / "in" / "europe" / "xx.json", json.dumps(page))
    write(tmp_path / "in" / "africa" / "yy.json", json.dumps({"Empty": {"text": "none"}}))
    write(tmp_path / "in" / "meta" / "zz.json", json.dumps(page))
    rows = [json.loads(line) for line in build(tmp_path / "in").decode().splitlines()]
    squeezed = prose.strip()
    assert rows == [{"id": "europe/xx", "text": f"Trade & aid {squeezed}\n\na < b {squeezed}\n\nnested {squeezed}"}]
    assert main([str(tmp_path / "in"), str(tmp_path / "out.xz")]) == 0
    assert "1 documents" in capsys.readouterr().out
    assert main([]) == 2
    with pytest.raises(ValueError, match="must have <region>/<code>.json files, got none in .*Unpack the tarball"):
        build(tmp_path / "out")


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo \xe2\x82\xac\r\n")
    assert read_documents(path) == ([Document("a.txt", text="one\ntwo €\r\n")], [])


def test_a_book_alone_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}, " + "word " * (i % 7 + 1) for i in range(300)]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs).encode())
    documents, notes = read_documents(path)
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    assert 30 <= len(documents) <= 40
    assert [document.id for document in documents[:2]] == ["book.txt#1", "book.txt#2"]
    assert notes == [f"{path} is one document; it was cut at blank lines into {len(documents)} sections"]
    lengths = [len(document.text) for document in documents]
    assert max(lengths) < 2 * min(lengths[:-1])


def test_a_book_in_a_directory_with_others_is_one_document(tmp_path):
    write(tmp_path / "a.txt", b"one\n\ntwo")
    write(tmp_path / "b.txt", b"three\n\nfour")
    assert [document.id for document in read_documents(str(tmp_path))[0]] == ["a.txt", "b.txt"]


def test_jsonl_rows_of_every_form_keep_their_line_numbers(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "extra": 1}]
    rows = jsonl({"text": "t\u2028u", "id": 3}, {"prompt": "p", "response": "r"})
    path = write(tmp_path / "mix.jsonl", rows + "\n  \r\n" + jsonl({"messages": chat, "prompt": "also there"}))
    documents, _ = read_documents(path)
    assert documents == [
        Document("mix.jsonl#1", text="t\u2028u"),
        Document("mix.jsonl#2", messages=(("user", "p"), ("assistant", "r"))),
        Document("mix.jsonl#5", messages=(("user", "q"), ("assistant", "a"))),
    ]


def test_a_directory_is_read_recursively_in_the_order_of_names_and_says_what_it_leaves_out(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.JSONL", jsonl({"text": "z"}))
    write(tmp_path / "c" / "d" / "e.txt", "e")
    write(tmp_path / "c" / "table.parquet", b"\x00\xff")
    write(tmp_path / ".git" / "x.txt", b"\xff")
    documents, notes = read_documents(str(tmp_path))
    assert [document.id for document in documents] == ["a/z.JSONL#1", "b.txt", "c/d/e.txt"]
    assert notes == ["1 files that are neither .txt nor .jsonl were left out: c/table.parquet"]


def test_a_function_by_its_import_path_is_a_source():
    documents, _ = read_documents("kdjax.data.sources:read_topics")
    assert documents == read_documents("topics")[0]


@pytest.mark.parametrize("missing", ["factbok", "", "nowhere/at/all.txt"])
def test_missing_path_is_named_with_a_suggestion(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"data\.path must be .* got '{missing}'; there is no such path") as error:
        read_documents(missing)
    assert "Known: factbook, topics" in str(error.value)
    assert missing != "factbok" or "Did you mean 'factbook'?" in str(error.value)


def test_unknown_function_is_named():
    with pytest.raises(ValueError, match=r"data\.path must name an importable object, got 'kdjax\.data:nothing'"):
        read_documents("kdjax.data:nothing")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8_names_file_and_byte_offset(tmp_path, suffix):
    path = write(tmp_path / f"latin{suffix}", b"caf" * 4000 + b"\xe9 au lait")
    with pytest.raises(ValueError, match=r"UTF-8 text, got byte 0xe9 at offset 12000 of ") as error:
        read_documents(path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"got bad JSON at {path}:2; .*delimiter"),
        ("[1]", r"one JSON object per line, got a list at {path}:2"),
        ('{"body": "a", "answer": "b"}', r'"text", got answer, body at {path}:2'),
        ('{"prompt": "a"}', r'"text", got prompt at {path}:2'),
        ("{}", r"got no field at {path}:2"),
        ('{"text": 3}', r'"text" must be a string, got int at {path}:2'),
        ('{"prompt": ["a"], "response": "b"}', r'"prompt" must be a string, got list at {path}:2'),
        ('{"messages": []}', r'"messages" must be a non-empty list, got \[\] at {path}:2'),
        ('{"messages": "hi"}', r"\"messages\" must be a non-empty list, got 'hi' at {path}:2"),
        (
            '{"messages": [{"from": "human", "value": "x"}]}',
            r'{{"role": text, "content": text}}, got .*human.* at {path}:2',
        ),
        ('{"messages": [{"role": "user", "content": null}]}', r"got .*None.* at {path}:2"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"an assistant turn, got roles user at {path}:2"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", jsonl({"text": "good"}) + line + "\n")
    with pytest.raises(ValueError, match=message.format(path=re.escape(path))):
        read_documents(path)


def test_unsupported_file_type_is_named(tmp_path):
    path = write(tmp_path / "rows.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"got '.*rows\.parquet'; files of type '\.parquet' are not supported"):
        read_documents(path)


def test_data_without_documents_is_an_error(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"directory with \.txt or \.jsonl files, got '.*void'; it is empty"):
        read_documents(str(tmp_path / "void"))
    write(tmp_path / "other" / "a.csv", "x")
    with pytest.raises(ValueError, match=r"; it holds a\.csv"):
        read_documents(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"data\.path must hold documents, got '.*empty\.jsonl'"):
        read_documents(write(tmp_path / "empty.jsonl", "\n\n"))
