"""The file of a choice of rows: `<workdir>/samples/manifest.json` and, beside it, the scores and the rows kept.

manifest.json says what the choice depends on (`Basis`), what it is (`rows`, `kept`), how it was made (`made`), and the
name and SHA-256 of the .npz: `scores` float32 [R] and `row_id` int32 [R] of all rows, `kept` int32 [K] their ids that
are kept, ascending, `row_hash` uint64 [K]. The .npz has its digest in its name and is there before the manifest that
names it, so a kill at any moment leaves the old choice or the new one.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import config, registry
from kdjax.curation.scores import SCORES
from kdjax.data import Rows, take
from kdjax.run_log import write_whole
from kdjax.types import Params

FORMAT = 1
FOLDER, MANIFEST = "samples", "manifest.json"  # of a workdir


@dataclasses.dataclass(frozen=True)
class Basis:
    """What a choice of rows depends on; None = it does not, or (teacher) it is not known here.

    student: `params_fingerprint` of the initial parameters. teacher: `LoadedModel.fingerprint`. tokenizer:
    `models.tokenizer.fingerprint`. data: `LoadedData.fingerprint`.
    """

    score: str
    fraction: float
    positions: float | None
    seed: int | None
    student: str | None
    teacher: str | None
    tokenizer: str
    data: str


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A choice as it was read; the columns are those of the .npz, `manifest` is the record beside it."""

    scores: np.ndarray
    row_id: np.ndarray
    kept: np.ndarray
    row_hash: np.ndarray
    manifest: dict[str, Any]


# Field of the basis -> what a message calls it
_MEANING = {
    "score": "samples.score",
    "fraction": "samples.fraction",
    "positions": "samples.positions",
    "seed": "samples.seed",
    "student": "the initial student",
    "teacher": "the teacher",
    "tokenizer": "the tokenizer",
    "data": "the data (text, split, data.seq_len or packing)",
}
_DIGESTS = ("student", "teacher", "tokenizer", "data")


def basis(samples: config.Samples, student_params: Params, teacher: str | None, tokenizer: str, data: str) -> Basis:
    """The `Basis` of what `samples` asks for; what its score does not read is None, so that it may change.

    A seed matters where something is drawn, the student where it is run. teacher: None if it is not loaded.
    """
    score = registry.lookup(SCORES, samples.score, "samples.score")
    drawn = not score.needs
    return Basis(
        score=samples.score,
        fraction=samples.fraction,
        positions=None if drawn else samples.positions,
        seed=samples.seed if drawn or samples.positions < 1 else None,
        student=None if drawn else params_fingerprint(student_params),
        teacher=teacher if score.needs_teacher else None,
        tokenizer=tokenizer,
        data=data,
    )


def params_fingerprint(params: Params) -> str:
    """sha256 hex over path, shape, dtype and bytes of all leaves; how they are stored on a mesh does not matter."""

    def digest(entry: tuple[Any, Any]) -> bytes:
        path, leaf = entry
        array = np.ascontiguousarray(np.asarray(leaf))
        said = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
        return hashlib.sha256(said.encode() + array.reshape(-1).view(np.uint8).data).digest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = pool.map(digest, ((path, _here(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _here(leaf: Any) -> Any:
    """The leaf, whole if parts of it are with other processes; these have to ask for all leaves in the same order."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and not leaf.is_fully_addressable:
        return np.asarray(jax.device_put(leaf, NamedSharding(sharding.mesh, P())))
    return leaf


def write_samples(
    workdir: Path, of: Basis, rows: Rows, scores: np.ndarray, kept: np.ndarray, made: Mapping[str, Any]
) -> None:
    """Write the choice `kept` (positions in `rows`) and all scores, or neither; an earlier choice in `workdir` goes.

    made: how it came about, for people. Raises OSError that names the directory if the disk cannot take it.
    """
    directory = workdir / FOLDER
    columns = {
        "scores": scores.astype(np.float32),
        "row_id": rows.row_id,
        "kept": rows.row_id[kept],
        "row_hash": rows.row_hash[kept],
    }
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    name = f"scores-{digest[:16]}.npz"
    record = {"format": FORMAT, **dataclasses.asdict(of), "rows": len(rows), "kept": len(kept)}
    record |= {"file": name, "sha256": digest, "made": dict(made)}
    try:
        write_whole(directory / name, buffer.getvalue())
        write_whole(directory / MANIFEST, json.dumps(record, indent=2, allow_nan=False) + "\n")
        for old in directory.glob("scores-*.npz*"):
            if old.name != name:
                old.unlink()
    except OSError as error:
        raise OSError(
            f"the chosen rows could not be written to {directory}: {error}. Free disk space or set another --workdir, "
            "then run the same command again."
        ) from error


def load_samples(workdir: Path, expected: Basis | None = None) -> Chosen:
    """The choice in `workdir`, if it is whole and made of what is `expected` (None: of anything).

    Raises ValueError that names all that differs and the command that chooses anew.
    """
    directory, command = workdir / FOLDER, f"python -m launch.curate --config=... --workdir={workdir}"
    if not (directory / MANIFEST).is_file():
        raise ValueError(
            f"{directory} must hold the rows that samples.fraction keeps, got no {MANIFEST}; they are not there yet. "
            f"Run `{command}`."
        )
    try:
        chosen = _read(directory)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{directory} must hold a whole choice of rows, got a damaged one; {error}. Run `{command}` again."
        ) from error
    differing = [] if expected is None else differences(chosen.manifest, expected)
    if differing:
        raise ValueError(
            f"{directory} must hold rows that were chosen for this experiment, got another choice: "
            f"{'; '.join(differing)}. Run `{command}` to choose anew, or undo these changes."
        )
    return chosen


def differences(manifest: Mapping[str, Any], expected: Basis) -> list[str]:
    """'samples.fraction is 0.2 there and 0.5 here' for each part of the basis that differs; None is not compared."""
    found = []
    for name, here in dataclasses.asdict(expected).items():
        there = manifest[name]
        if there != here and there is not None and here is not None:
            shown = [str(value)[:12] if name in _DIGESTS else repr(value) for value in (there, here)]
            found.append(f"{_MEANING[name]} is {shown[0]} there and {shown[1]} here")
    return found


def reusable(workdir: Path, expected: Basis) -> tuple[Chosen | None, str]:
    """(a choice whose scores hold for `expected`, whatever its fraction, or None; why not, '' if there is none at all).

    Scores do not depend on the fraction: another one needs no new pass.
    """
    if not (workdir / FOLDER / MANIFEST).is_file():
        return None, ""
    try:
        chosen = load_samples(workdir)
    except ValueError as error:
        return None, str(error)
    same = dataclasses.replace(expected, fraction=chosen.manifest["fraction"])
    differing = differences(chosen.manifest, same)
    return (None, "; ".join(differing)) if differing else (chosen, "")


def kept_rows(rows: Rows, workdir: Path, expected: Basis) -> Rows:
    """The rows of the choice in `workdir`, in the order of `rows`, with their ids, weights and hashes.

    rows: the training text, of which `expected.data` is the fingerprint. Raises ValueError as `load_samples` does.
    """
    return take(rows, positions_of(load_samples(workdir, expected), rows))


def positions_of(chosen: Chosen, rows: Rows) -> np.ndarray:
    """int64 [K], ascending: where the kept rows are in `rows`. ValueError if one is missing or has other content."""
    order = np.argsort(rows.row_id, kind="stable")
    at = np.searchsorted(rows.row_id[order], chosen.kept)
    at = order[np.minimum(at, len(rows) - 1)]
    wrong = (rows.row_id[at] != chosen.kept) | (rows.row_hash[at] != chosen.row_hash)
    if wrong.any():
        raise ValueError(
            f"the kept rows must be rows of this text, got {int(wrong.sum())} of {len(wrong)} that are not in "
            f"it or have other content, the first is row {chosen.kept[wrong][0]}. Pass all rows of the training text."
        )
    return np.sort(at)


def _read(directory: Path) -> Chosen:
    record = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']!r}, this version reads {FORMAT}")
    absent = [field.name for field in dataclasses.fields(Basis) if field.name not in record]
    if absent:
        raise ValueError(f"{MANIFEST} does not say {', '.join(absent)}")
    content = (directory / Path(record["file"]).name).read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"the SHA-256 of {record['file']} is not the one in {MANIFEST}")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return Chosen(**{name: stored[name] for name in ("scores", "row_id", "kept", "row_hash")}, manifest=record)
