"""The notebooks: clean on disk, and each runs from top to bottom in a kernel of its own with settings for tests."""

import ast
import html
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "notebooks" / "00_quickstart.ipynb"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def trees(path):
    return [ast.parse(cell.source) for cell in code_cells(read(path))]


def cell_of(notebook, name):
    (found,) = [cell for cell in notebook.cells if cell.id == name]
    return found


# --- on disk


def test_there_are_notebooks():
    assert QUICKSTART in NOTEBOOKS


@every_notebook
def test_it_is_valid_and_holds_no_output(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    names = [cell.id for cell in notebook.cells]
    assert len(set(names)) == len(names)
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@every_notebook
def test_all_settings_are_in_the_first_code_cell(path):
    first, *others = code_cells(read(path))
    assert first.metadata.tags == ["parameters"]
    settings = set()
    for line in ast.parse(first.source).body:
        assert isinstance(line, ast.Assign)
        ast.literal_eval(line.value)
        settings |= {target.id for target in line.targets}
    assert all(name.isupper() for name in settings)
    for cell in others:
        stored = {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name) and n.ctx == ast.Store()}
        assert not {name for name in stored if name.isupper()}, cell.id
    used = {node.id for tree in trees(path)[1:] for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert settings <= used


@every_notebook
def test_it_uses_the_library_and_defines_nothing(path):
    for tree in trees(path):
        for node in ast.walk(tree):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Lambda))


@every_notebook
def test_it_names_no_place_of_one_machine(path):
    for cell in read(path).cells:
        assert not re.search(r"(?<![\w.:/])[/~][a-z]\w*/", cell.source), cell.id


@every_notebook
def test_what_it_imports_is_there(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for tree in trees(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert importlib.util.find_spec(alias.name), alias.name
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    attribute = hasattr(importlib.import_module(node.module), alias.name)
                    assert attribute or importlib.util.find_spec(submodule), submodule


@every_notebook
def test_the_commands_it_shows_exist(path):
    text = "\n".join(cell.source for cell in read(path).cells)
    scripts, configs = re.findall(r"\blaunch\.(\w+)", text), re.findall(r"\bconfigs/[\w/]+\.py", text)
    assert scripts
    assert [name for name in scripts if not (ROOT / "launch" / f"{name}.py").is_file()] == []
    assert [name for name in configs if not (ROOT / name).is_file()] == []


# --- the cell that installs


def installing(monkeypatch, folder, installed, repository=""):
    """Run the cell in `folder` where only these packages are; the commands it would have run, its variables."""
    called = []

    class Distribution:
        def __init__(self, name, version):
            self.name, self.version = name, version

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda line, check: called.append(line))
    if installed is not None:
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Distribution(*one) for one in installed])
    variables = {"REPOSITORY": repository}
    exec(compile(cell_of(read(QUICKSTART), "install-code").source, "install", "exec"), variables)
    return called, variables


def test_nothing_is_installed_where_all_is_there(monkeypatch):
    called, variables = installing(monkeypatch, ROOT / "notebooks", None)
    assert called == []
    assert variables["root"] == ROOT == pathlib.Path.cwd()


def packages(**versions):
    """Every dependency of the project in a version far above the bound, but for these; None: absent."""
    text = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^  "([\w-]+)[^"]*>=', text, re.MULTILINE)
    assert {"jax", "tensorboardX", "orbax-checkpoint"} <= set(names)
    found = dict.fromkeys(names, "99") | {"orbax-checkpoint": "0.12.8"} | versions
    return [(name, version) for name, version in found.items() if version is not None]


@pytest.mark.parametrize(
    ("plugin", "extra"),
    [("jax-cuda12-plugin", ["jax[cuda12]"]), ("jax_cuda13_plugin", ["jax[cuda13]"]), ("libtpu", ["jax[tpu]"])],
)
def test_an_old_jax_is_replaced_together_with_its_plugin(monkeypatch, plugin, extra):
    monkeypatch.delitem(sys.modules, "jax")
    ((_, _, *line),), _ = installing(monkeypatch, ROOT, [*packages(jax="0.7.2"), (plugin, "0.7.2")])
    assert line == ["pip", "install", "--quiet", "jax>=0.10.2", *extra]


def test_a_new_jax_is_kept_and_a_replaced_package_in_use_asks_for_a_restart(monkeypatch):
    monkeypatch.delitem(sys.modules, "grain", raising=False)
    ((_, _, *line),), _ = installing(monkeypatch, ROOT, packages(grain=None))
    assert line == ["pip", "install", "--quiet", "grain>=0.2.18"]
    with pytest.raises(SystemExit, match="Runtime > Restart session"):
        installing(monkeypatch, ROOT, packages(numpy="1.26"))


def test_outside_a_clone_the_address_is_needed(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="REPOSITORY must be set, got ''; there is no clone of kdjax here"):
        installing(monkeypatch, tmp_path, None)


def test_outside_a_clone_it_makes_one(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError):  # nothing was really cloned
        installing(monkeypatch, tmp_path, None, "https://example.org/kdjax.git")


# --- run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the executed quickstart, its workdir): three steps of a tiny random model, in a kernel of its own."""
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    text = [{"text": f"{i} bottles of beer & {i % 7} of milk on the wall, all of them green."} for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    overrides = {
        "data.path": str(folder / "text.jsonl"),
        "train.log_every": 1,
        "optim.warmup": 1,
        "eval.rows": 4,
        "eval.completions": 1,
        "eval.new_tokens": 4,
        "log.tensorboard": False,
    }
    settings = {"TEACHER": "synthetic", "LAYERS": 1, "STEPS": 3, "SEQ_LEN": 32, "FRACTION": 0.5}
    settings |= {"OVERRIDES": overrides, "WORKDIR": str(folder / "run")}
    notebook = read(QUICKSTART)
    place = notebook.cells.index(cell_of(notebook, "parameters")) + 1
    lines = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells.insert(place, nbformat.v4.new_code_cell(lines, id="injected"))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook, folder / "run"


def printed(notebook, name):
    return "".join(out.text for out in cell_of(notebook, name).outputs if out.get("name") == "stdout")


def shown(notebook, name):
    """The page inside the frame that a cell shows."""
    (output,) = cell_of(notebook, name).outputs
    (page,) = re.findall(r'srcdoc="([^"]*)"', output.data["text/html"])
    return html.unescape(page)


def test_every_cell_runs(ran):
    notebook, _ = ran
    assert [cell.id for cell in code_cells(notebook) if cell.execution_count is None] == []
    assert printed(notebook, "install-code").endswith("0 packages installed\n")
    assert printed(notebook, "experiment-code") == "1 cpu device(s), float32, 4 rows per step\n"
    assert printed(notebook, "train-code") == "3 of 3 steps\n"


def test_the_settings_reach_the_run(ran):
    _, workdir = ran
    config = json.loads((workdir / "config.json").read_text())
    assert config["teacher"]["path"] == "synthetic"
    assert config["student"]["init"] | {"layers": 1} == config["student"]["init"]
    assert (config["selection"]["fraction"], config["data"]["seq_len"], config["train"]["log_every"]) == (0.5, 32, 1)
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_it_shows_what_the_report_shows(ran):
    notebook, workdir = ran
    report = (workdir / "report.html").read_text()
    wanted = {
        "figures-code": r"<table>.*?</table>",
        "curves-code": r"<figure.*</figure>",
        "tokens-code": r'<div class="page">.*?</div>',
        "completions-code": r'<div class="answers">.*?</div></div></div>',
    }
    for name, part in wanted.items():
        inside, whole = (re.search(part, page, re.DOTALL) for page in (shown(notebook, name), report))
        assert inside, name
        assert whole
        assert inside[0][:2000] == whole[0][:2000]
    assert "<h2>Curves" not in shown(notebook, "figures-code")
