"""The house rules that a machine can check: import direction, budgets, who may touch what, what the pages promise.

A check is a function from sources (path -> text) to complaints. `test_the_repository` runs each over the repository and
`test_the_check_sees` over a snippet that breaks it, so that no check can rot into one that never complains.
"""

import ast
import fnmatch
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
Sources = dict[str, str]
Complaints = Iterator[str]

# Imports go down only.
LEVELS = [
    "types registry metrics schedules config run_log",
    "sharding aot kernels",
    "models data optim",
    "teacher selection losses generation verifiers",
    "step curation analysis",
    "build checkpoint evals",
    "offline run",
    "loop",
    "launch configs",
]
LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms.split()}
SAME_LEVEL = {
    ("config", "registry"): "the suggestion in the error of an unknown field",
    ("schedules", "registry"): "SCHEDULES is a table",
    ("curation", "step"): "LanguageModel, a model cut in two",
    ("schedules", "types"): "the contract",
    ("metrics", "types"): "the contract",
}
# table -> its room; outside it only build/ turns names into objects
TABLES = {"LOSSES": "losses", "POLICIES": "selection", "SIGNALS": "selection", "FAMILIES": "models"}
TABLE_READERS = {"kdjax/build/parts.py": "where names become objects"}
SOFTMAX_OUTSIDE_KERNELS = {"kdjax/models/layers.py": "attention, over keys and not over the vocabulary"}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "transformers", "tokenizers", "torch"}
DISTRIBUTIONS = {"absl": "absl-py", "ml_collections": "ml-collections", "orbax": "orbax-checkpoint"}  # if not the same


# --- reading


def repository() -> Sources:
    """Every text file that is ours, by its path; what runs, caches and environments hold is not."""
    sources = {}
    for folder, folders, files in os.walk(ROOT):
        here = pathlib.Path(folder)
        hidden = {name for name in folders if name.startswith(".") and name not in (".ci", ".github")}
        made = {"__pycache__"} | ({"runs", "build", "dist"} if here == ROOT else set())
        folders[:] = sorted(name for name in folders if name not in hidden | made and not name.endswith(".egg-info"))
        for name in files:
            try:
                sources[(here / name).relative_to(ROOT).as_posix()] = (here / name).read_text("utf-8")
            except UnicodeDecodeError:
                continue  # the compressed corpus
    return sources


def trees(sources: Sources, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of the Python files in these top folders; of kdjax, launch and configs if none is named."""
    for path, text in sources.items():
        if path.endswith(".py") and path.split("/")[0] in (folders or ("kdjax", "launch", "configs")):
            yield path, ast.parse(text, path)


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, at any depth, by statement or by importlib."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def room_of(dotted: str) -> str:
    """kdjax.losses.jsd -> losses, kdjax/step.py -> step, launch.train -> launch; '' for kdjax itself and strangers."""
    first, *rest = dotted.removesuffix(".py").replace("/", ".").split(".")
    if first == "kdjax":
        return rest[0] if rest and not rest[0].startswith("__") else ""
    return first if first in ("launch", "configs") else ""


# --- (a) directions


def check_direction(sources: Sources) -> Complaints:
    for path, tree in trees(sources):
        room = room_of(path)
        if room and room not in LEVEL:
            yield f"{path}: {room} has no level in LEVELS; give it one"
            continue
        for line, dotted in imports(path, tree):
            other = room_of(dotted)
            if not other or other == room:
                continue
            if other in ("launch", "configs"):
                yield f"{path}:{line}: {other} is imported by nobody"
            elif other not in LEVEL:
                yield f"{path}:{line}: {dotted} is in no room"
            elif LEVEL[other] >= LEVEL.get(room, -1) and (room, other) not in SAME_LEVEL:
                yield f"{path}:{line}: {room or 'kdjax'} must not import {other}; imports go down only"


# --- (b) budgets


def check_budgets(sources: Sources) -> Complaints:
    for path, tree in trees(sources):
        kernel = path.startswith("kdjax/kernels/")
        length, limit = len(sources[path].splitlines()), 700 if kernel else 400
        if length > limit:
            yield f"{path}: {length} lines, the budget is {limit}"
        if path.endswith("/utils.py"):
            yield f"{path}: utils is no name; say what it does"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                yield f"{path}:{node.lineno}: class {node.name}; a run is a loop over a pure step"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not (kernel or path == "kdjax/step.py"):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, the budget is 60"
    root = [path for path in sources if re.fullmatch(r"kdjax/\w+\.py", path)]
    if len(root) > 15:
        yield f"kdjax/ has {len(root)} files, the budget is 15"


# --- (c) who may touch what


def check_owners(sources: Sources) -> Complaints:
    for path, tree in trees(sources):
        for line, dotted in imports(path, tree):
            if dotted.split(".")[0] == "orbax" and path != "kdjax/checkpoint.py":
                yield f"{path}:{line}: orbax is imported by kdjax/checkpoint.py only"
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            for name in set(names) & set(TABLES):
                if room_of(path) != TABLES[name] and path not in TABLE_READERS:
                    yield f"{path}:{node.lineno}: {name} is read by kdjax/build/parts.py and its own room only"


# --- (d) what library code does not do


def check_conduct(sources: Sources) -> Complaints:
    for path, tree in trees(sources):
        for line, dotted in imports(path, tree):
            if dotted.split(".")[0] in ("torch", "torchvision"):
                yield f"{path}:{line}: torch is a test oracle, never imported at run time"
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield f"{path}:{node.lineno}: assert; raise ValueError with the path of what is wrong"
            elif isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    yield f"{path}:{node.lineno}: bare except"
                broad = node.type is not None and re.search(r"\b(Base)?Exception\b", ast.unparse(node.type))
                if broad and all(isinstance(s, (ast.Pass, ast.Continue, ast.Expr)) for s in node.body):
                    if not any(isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) for s in node.body):
                        yield f"{path}:{node.lineno}: a swallowed exception"
            elif isinstance(node, ast.Call) and re.search(r"suppress\((Base)?Exception\b", ast.unparse(node)):
                yield f"{path}:{node.lineno}: a swallowed exception"


# --- (e) documentation, and the vocabulary


def check_docstrings(sources: Sources) -> Complaints:
    for path, tree in trees(sources):
        if not ast.get_docstring(tree):
            yield f"{path}:1: the module does not say what it is"
        for node in tree.body if path.startswith("kdjax/") else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    yield f"{path}:{node.lineno}: {node.name} has no docstring"


def check_vocabulary(sources: Sources) -> Complaints:
    # jax.nn.log_softmax and jax.scipy's logsumexp as well as optax.softmax_cross_entropy and its like
    for path, tree in trees(sources):
        if path.startswith("kdjax/kernels/") or path in SOFTMAX_OUTSIDE_KERNELS:
            continue
        for node in ast.walk(tree):
            found = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            found |= {node.attr} if isinstance(node, ast.Attribute) else set()
            for name in sorted(name for name in found if re.search("softmax|logsumexp", name)):
                yield f"{path}:{node.lineno}: {name}; statistics over the vocabulary are the kernels'"


# --- (g), (h) what the pages say


def check_machine_paths(sources: Sources) -> Complaints:
    folders = "|".join(("work", "tmp/venv", "tmp/dl", "tmp/brief", "home", "root"))
    for path, text in sources.items():
        for found in re.finditer(rf"(?<![\w.\-/])/(?:{folders})/", text):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path}:{line}: {found.group()}... is a place on somebody's machine"


def check_commands(sources: Sources) -> Complaints:
    targets = set(re.findall(r"^([\w-]+):", sources.get("Makefile", ""), re.MULTILINE))
    for path, text in sources.items():
        config = re.fullmatch(r"configs/(?!__init__)\w+\.py", path)
        if config and not re.search(r"python -m launch\.\w+ .*--config=" + path, text):
            yield f"{path}: the header has no command that runs it"
        if not config and path not in ("README.md", "CONTRIBUTING.md"):
            continue
        for name in re.findall(r"python -m launch\.(\w+)", text):
            if f"launch/{name}.py" not in sources:
                yield f"{path}: python -m launch.{name} does not exist"
        for name in re.findall(r"--config=(configs/[\w/]+\.py)", text):
            if name not in sources:
                yield f"{path}: --config={name} does not exist"
        for name in re.findall(r"(?:^|`|&& |\$ )make ([a-z][\w-]*)", text, re.MULTILINE):
            if name not in targets:
                yield f"{path}: make {name} does not exist"


# --- packaging


def pins(text: str, python: str) -> dict[str, str]:
    """Name -> version of the exact pins that hold under this Python."""
    found = {}
    for line in text.splitlines():
        line = line.split(" #")[0].strip()
        if line and not line.startswith(("#", "-r")):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                (only,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = only.version if only.operator == "==" else ""
    return found


def check_requirements(sources: Sources) -> Complaints:
    project = tomllib.loads(sources["pyproject.toml"])["project"]
    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    for python in ("3.11", "3.12", "3.13"):
        pinned = pins(sources["requirements.txt"], python)
        for name, version in pinned.items():
            if not version:
                yield f"requirements.txt: {name} is not pinned with =="
        for name, specifier in wanted.items():
            if not pinned.get(name) or pinned[name] not in specifier:
                has = f"requirements.txt: {name} {pinned.get(name)} on Python {python}"
                yield f"{has}, pyproject.toml wants {specifier}"
    optional = {Requirement(r).name for extra in project["optional-dependencies"].values() for r in extra}
    for path, tree in trees(sources):
        for line, dotted in imports(path, tree):
            top = dotted.split(".")[0]
            name = canonicalize_name(DISTRIBUTIONS.get(top, top))
            if top not in {"kdjax", "launch", "configs", *sys.stdlib_module_names} and name not in {*wanted, *optional}:
                yield f"{path}:{line}: {name} is in no dependency list of pyproject.toml"


def check_package_data(sources: Sources) -> Complaints:
    globs = tomllib.loads(sources["pyproject.toml"])["tool"]["setuptools"]["package-data"]["kdjax"]
    for path in sources:
        name = path.removeprefix("kdjax/")
        if name != path and not path.endswith(".py"):
            if not any(fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(name, glob.replace("**/", "")) for glob in globs):
                yield f"{path}: matches no package-data pattern of pyproject.toml, a wheel would lack it"


# --- the checks, on the repository and on what breaks them

CHECKS: dict[str, Callable[[Sources], Complaints]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


@pytest.fixture(scope="module")
def sources() -> Sources:
    found = repository()
    assert {"Makefile", "pyproject.toml", "kdjax/build/parts.py", "tests/test_architecture.py", ".ci/run"} <= set(found)
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_the_repository(check, sources):
    complaints = list(CHECKS[check](sources))
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


DOC = '"""Said."""\n'
TOML = '[project]\ndependencies = ["jax>=0.10.2"]\n[project.optional-dependencies]\nw = ["wandb"]\n'
DATA = '[tool.setuptools.package-data]\nkdjax = ["**/*.xz"]\n'
BAD = [
    ("direction", {"kdjax/losses/a.py": "import kdjax.models.layers, kdjax.teacher"}, "must not import teacher"),
    ("direction", {"kdjax/selection/a.py": "from kdjax import types, losses"}, "must not import losses"),
    ("direction", {"kdjax/teacher/a.py": "def f():\n    from ..selection import stats"}, "a.py:2: teacher must not"),
    ("direction", {"kdjax/types.py": "from kdjax.step import f"}, "types must not import step"),
    ("direction", {"kdjax/config.py": "from . import build"}, "config must not import build"),
    ("direction", {"kdjax/optim.py": "import importlib\nimportlib.import_module('kdjax.data')"}, "not import data"),
    ("direction", {"kdjax/__init__.py": "from kdjax.types import Batch"}, "kdjax must not import types"),
    ("direction", {"kdjax/loop.py": "import launch.train"}, "launch is imported by nobody"),
    ("direction", {"launch/train.py": "from configs import quickstart"}, "configs is imported by nobody"),
    ("direction", {"kdjax/helpers/a.py": ""}, "helpers has no level"),
    ("budgets", {"kdjax/a.py": "x = 1\n" * 401}, "401 lines"),
    ("budgets", {"kdjax/kernels/op/a.py": "x = 1\n" * 701}, "701 lines"),
    ("budgets", {"kdjax/loop.py": "class A:\n    def f():\n" + "        x = 1\n" * 60}, "f has 61 lines"),
    ("budgets", {"kdjax/data/utils.py": ""}, "utils is no name"),
    ("budgets", {"launch/a.py": "class KDTrainer: pass"}, "class KDTrainer"),
    ("budgets", {f"kdjax/a{i}.py": "" for i in range(16)}, "16 files"),
    ("owners", {"kdjax/loop.py": "def f():\n    from orbax.checkpoint import v1"}, "orbax is imported by"),
    ("owners", {"kdjax/step.py": "from kdjax.losses import LOSSES"}, "LOSSES is read by"),
    ("owners", {"launch/a.py": "import kdjax.selection as s\nprint(s.SIGNALS)"}, "SIGNALS is read by"),
    ("conduct", {"kdjax/a.py": "assert True"}, "assert"),
    ("conduct", {"kdjax/a.py": "try: f()\nexcept: raise"}, "bare except"),
    ("conduct", {"launch/a.py": "try: f()\nexcept (OSError, Exception): pass"}, "swallowed"),
    ("conduct", {"kdjax/a.py": "for x in y:\n  try: f()\n  except BaseException: continue"}, "swallowed"),
    ("conduct", {"kdjax/a.py": "import contextlib\nwith contextlib.suppress(Exception): f()"}, "swallowed"),
    ("conduct", {"configs/a.py": "def f():\n    import torch.nn"}, "torch is a test oracle"),
    ("docstrings", {"kdjax/a.py": "x = 1"}, "the module does not say"),
    ("docstrings", {"kdjax/a.py": DOC + "def f(): pass"}, "f has no docstring"),
    ("docstrings", {"kdjax/a.py": DOC + "class C: pass"}, "C has no docstring"),
    ("vocabulary", {"kdjax/losses/a.py": "jax.nn.softmax(x)"}, "softmax;"),
    ("vocabulary", {"kdjax/step.py": "from jax.scipy.special import logsumexp"}, "logsumexp;"),
    ("vocabulary", {"launch/a.py": "optax.softmax_cross_entropy(x, y)"}, "launch/a.py:1: softmax_cross_entropy;"),
    ("machine_paths", {"README.md": "see\n/" + "work/x"}, "README.md:2"),
    ("machine_paths", {"kdjax/a.py": "'/" + "tmp/venv/bin'"}, "a place on somebody's machine"),
    ("commands", {"README.md": "python -m launch.trian --x"}, "launch.trian does not exist"),
    ("commands", {"README.md": "--config=configs/nix.py"}, "nix.py does not exist"),
    ("commands", {"README.md": "```\nmake nix\n```", "Makefile": "test: x\n"}, "make nix does not exist"),
    ("commands", {"CONTRIBUTING.md": "say `make nix`"}, "make nix does not exist"),
    ("commands", {"configs/a.py": DOC}, "no command"),
    ("requirements", {"pyproject.toml": TOML, "requirements.txt": "jax>=0.10.2"}, "is not pinned"),
    ("requirements", {"pyproject.toml": TOML, "requirements.txt": "jax==0.9"}, "wants >=0.10.2"),
    (
        "requirements",
        {"pyproject.toml": TOML, "requirements.txt": 'jax==1; python_version<"3.12"'},
        "None on Python 3.13",
    ),
    (
        "requirements",
        {"pyproject.toml": TOML, "requirements.txt": "", "kdjax/a.py": "import pandas"},
        "pandas is in no",
    ),
    ("package_data", {"pyproject.toml": DATA, "kdjax/data/a.json": "{}"}, "a wheel would lack it"),
]
GOOD = {
    "direction": {
        "kdjax/losses/a.py": "from kdjax.types import Batch\nfrom kdjax.losses import b\nimport jax",
        "kdjax/config.py": "from kdjax import __version__, registry",
        "launch/train.py": "from kdjax import loop\nfrom launch import arguments",
    },
    "budgets": {"kdjax/step.py": "def f():\n" + "    x = 1\n" * 80, "kdjax/kernels/a.py": "x = 1\n" * 700},
    "owners": {"kdjax/build/parts.py": "from kdjax.losses import LOSSES", "kdjax/checkpoint.py": "import orbax.saver"},
    "conduct": {"kdjax/a.py": "try: f()\nexcept OSError: pass", "tests/a.py": "import torch\nassert torch"},
    "docstrings": {"kdjax/a.py": DOC + "def f():\n    'Said.'\ndef _g(): pass"},
    "vocabulary": {
        "kdjax/kernels/a.py": "jax.nn.softmax(x)",
        "kdjax/models/layers.py": "jax.nn.softmax(x)",
        "launch/a.py": "'softmax'",
        "tests/a.py": "jax.nn.softmax(x)",
    },
    "machine_paths": {"README.md": "runs/work/a and ./home/x and https://x.org/root/"},
    "commands": {"README.md": "It will make sure: `make test`, --config=<yours>.py", "Makefile": "test: x\n"},
    "requirements": {"pyproject.toml": TOML, "requirements.txt": "jax==0.11", "kdjax/a.py": "import os, jax, wandb"},
    "package_data": {"pyproject.toml": DATA, "kdjax/a.py": "", "kdjax/data/a.xz": "", "README.md": ""},
}


@pytest.mark.parametrize(("check", "snippet", "complaint"), BAD)
def test_the_check_sees(check, snippet, complaint):
    assert complaint in "\n".join(CHECKS[check](snippet))


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_lets_pass(check):
    assert list(CHECKS[check](GOOD[check])) == []


def test_every_check_is_tested():
    assert {check for check, *_ in BAD} == set(CHECKS) == set(GOOD)
    assert not {("teacher", "selection"), ("teacher", "losses"), ("selection", "losses")} & {
        pair for a, b in SAME_LEVEL for pair in ((a, b), (b, a))
    }


# --- (f) --help and config paths are light

LOADER = """
import importlib.util, json, sys
from absl import flags
import kdjax.config
heavy, loaded = set(json.loads(sys.argv[1])), []
for path in ["kdjax.config", *sys.argv[2:]]:
    if path.endswith(".py"):
        known = set(flags.FLAGS)
        spec = importlib.util.spec_from_file_location("loaded", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, "get_config", lambda: None)()
        for name in set(flags.FLAGS) - known:  # every launch script defines --config
            delattr(flags.FLAGS, name)
    found = sorted(heavy & set(sys.modules))
    loaded += [f"{path} loads {name}" for name in found]
    heavy -= set(found)
print(json.dumps(loaded))
"""


def loaded_by(paths: list[pathlib.Path], heavy: set[str]) -> list[str]:
    command = [sys.executable, "-c", LOADER, json.dumps(sorted(heavy)), *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_configs_and_launch_scripts_load_nothing_heavy():
    paths = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "launch").glob("*.py")])
    assert loaded_by(paths, HEAVY) == []


def test_a_heavy_config_is_seen(tmp_path):
    (tmp_path / "light.py").write_text("import json\n")
    (tmp_path / "heavy.py").write_text("def get_config():\n    import wave\n")
    found = loaded_by([tmp_path / "light.py", tmp_path / "heavy.py"], {"wave"})
    assert found == [f"{tmp_path / 'heavy.py'} loads wave"]
