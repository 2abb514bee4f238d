"""report.html from plain files: what it says, that nothing in it is live, that it needs nothing else."""

import json
import re
import subprocess
import sys

import pytest

from kdjax.analysis import write_report
from kdjax.analysis.report import summary
from tests.analysis import html_page

EVIL = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"


def estimate(value):
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def evaluation(step, perplexity, teacher=True):
    figures = {name: estimate(0.25) for name in ("nll", "accuracy", "ece", "entropy")}
    bins = {"count": [20.0, 30.0], "confidence": [4.0, 24.0], "correct": [5.0, 21.0]}
    record = {"step": step, "seconds": 1.0, "which": "student", "tokens": 4096, "rows": 32}
    record["student"] = {**figures, "perplexity": estimate(perplexity), "calibration": bins}
    if teacher:
        record["teacher"] = {**figures, "perplexity": estimate(28.8), "calibration": bins}
        record |= {"kl": estimate(perplexity / 100), "agreement": estimate(0.123)}
    return record


def metrics(count):
    return [{"step": s, "seconds": 0.1 * s, "loss": 9.0 - s / 100, "learning_rate": 4e-4} for s in range(1, count + 1)]


def data():
    token = {"entropy": 2.0, "nll": 1.0, "rank": 1, "selected": False, "eligible": True}
    text = [{**token, "token": EVIL, "selected": True}, {**token, "token": " plain", "entropy": 0.25, "rank": 2}]
    text += [{**token, "token": "\n"}, {**token, "token": ""}]
    text += [{"token": "first", "entropy": None, "nll": None, "rank": None, "selected": False, "eligible": False}]
    return {
        "summary": {"teacher": EVIL, "teacher_layers": 30, "steps": 20, "seed": 0, "data": EVIL},
        "text": text,
        "text_note": EVIL,
        "completions": [{"prompt": EVIL, "teacher": EVIL, "before": "", "after": "fine"}],
        "command": f"python -m launch.train {EVIL}",
        "versions": {EVIL: "1.0"},
        "fingerprints": {"config": EVIL},
    }


def write(root, *, lines=(), evals=(), config=None, report=None):
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    for name, content in (("config.json", config), ("report_data.json", report)):
        if content is not None:
            (root / name).write_text(json.dumps(content))
    return write_report(root).read_text()


class Page(html_page.Page):
    @property
    def text(self):
        """Plain signs for times, dash and fixed space."""
        return super().text.translate({0xD7: "x", 0x2013: "-", 0xA0: " "})


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    evals = [evaluation(0, 1.1e6), evaluation(10, 2328.0), evaluation(20, 297.0)]
    return write(root, lines=metrics(60), evals=evals, config={"name": EVIL, "seed": 3}, report=data())


def test_well_formed_and_self_contained(full):
    page = Page(full)
    assert page.open == page.badly_nested == []
    assert "http" not in full.replace("http-equiv", ""), "no address of anything outside"
    assert not {tag for tag, _ in page.elements} & {"img", "link", "iframe", "object"}
    assert not [attrs for _, attrs in page.elements if attrs.keys() & {"src", "href"}]
    assert 'name="viewport"' in full
    assert "prefers-color-scheme: dark" in full


def test_everything_is_escaped(full):
    page = Page(full)
    assert [tag for tag, _ in page.elements].count("script") == 1, "only our own"
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.text.count(EVIL) >= 9, "all of it is there, as text"
    assert EVIL not in full


def test_table_has_before_after_teacher_with_intervals(full):
    text = re.sub(r"\s+", " ", Page(re.search(r"<table>.*</table>", full, re.DOTALL)[0]).text)
    assert re.search(r"Student before\s*Student after\s*Teacher", text)
    assert "1.1 x 10⁶[9.9 x 10⁵, 1.2 x 10⁶]297[267, 327]28.8[25.9, 31.7]" in text
    assert "KL to the teacher nats1.1 x 10⁴" not in text
    assert "Top-1 agreement with the teacher %12.3[11.1, 13.5]12.3[11.1, 13.5]-" in text
    assert "4,096 tokens in 32 rows" in Page(full).text


def test_curves(full):
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", full)
    assert titles == [
        "Training loss",
        "Held-out KL to the teacher",
        "Held-out perplexity",
        "Calibration",
        "Learning rate",
    ]
    assert full.count("<svg") == 5


def test_two_evaluations_are_a_table_and_no_curve(tmp_path):
    text = write(tmp_path, lines=metrics(3), evals=[evaluation(0, 100.0), evaluation(9, 50.0)])
    assert "Held-out perplexity" not in text
    assert "Student after" in text


def test_lines_of_other_models_and_their_order_do_not_matter(tmp_path):
    evals = [evaluation(20, 50.0), {**evaluation(30, 7.0), "which": "ablation"}, evaluation(0, 100.0)]
    page = Page(write(tmp_path, evals=evals))
    assert "before 100" in page.text
    assert "ablation" not in page.text


def test_text_page_marks(full):
    page = Page(full)
    tokens = {
        attrs["title"]: attrs["class"].split() for tag, attrs in page.elements if tag == "span" and "title" in attrs
    }
    evil, plain, newline, part, first = tokens.items()
    assert evil[0] == f"“{EVIL}”\nentropy 2.00 nats\nlabel nll 1.00 nats\nrank 1 of 4 by entropy\nselected"
    assert evil[1] == ["h9", "sel"]
    assert plain[1] == ["h1"]
    assert newline[1] == ["h9", "nl"]
    assert newline[0].startswith("“↵”")
    assert part[1] == ["h9", "part"]
    assert first == ("“first”\nno target", ["off"])
    assert "1 of 4 targets are selected (25.0 %); they hold 32.0 % of the entropy" in page.text
    assert "2 nats or more" in page.text


def test_evaluation_without_a_teacher(tmp_path):
    page = Page(write(tmp_path, evals=[evaluation(0, 100.0, teacher=False)]))
    assert "Perplexity" in page.text
    assert "KL to" not in page.text.split("4,096 tokens")[0]


def test_a_diverged_run_still_has_a_report(tmp_path):
    broken = evaluation(5, 100.0)
    broken["student"]["perplexity"] = broken["kl"] = {"value": None, "low": None, "high": None}
    lines = [*metrics(5), {"step": 6, "seconds": 1.0, "loss": None}]
    page = Page(write(tmp_path, lines=lines, evals=[evaluation(0, 100.0), evaluation(3, 90.0), broken]))
    assert "-[-, -]" in page.text


def test_only_metrics(tmp_path):
    page = Page(write(tmp_path, lines=metrics(1)))
    assert "Training loss" in page.text
    assert "Held-out" not in page.text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"workdir must be the directory of a run, got '.*'; it has neither metrics\.jsonl"
    ):
        write_report(tmp_path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "report_data.json").write_text("{")
    with pytest.raises(ValueError, match=r"report_data\.json must be a JSON object; Expecting"):
        write(tmp_path, lines=metrics(2))
    (tmp_path / "report_data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"report_data\.json must be a JSON object, got list"):
        write_report(tmp_path)


def test_summary_sentences():
    fields = {
        "teacher": "T",
        "teacher_layers": 30,
        "teacher_parameters": 134515008,
        "student": "cut",
        "student_layers": 6,
    }
    fields |= {
        "data": "Factbook",
        "loss": "forward KL",
        "selection": "20 % of positions",
        "steps": 200,
        "tokens": 204800,
    }
    fields |= {"seed": 0, "seconds": 312.0, "hardware": "2 CPU cores", "student_parameters": 49554240}
    assert summary(fields) == (
        "Teacher: T, 30 layers, 135 M parameters. Student: cut, 6 layers, 49.6 M parameters. Distilled on Factbook, "
        "with forward KL, supervised at 20 % of positions. 200 steps, 204,800 tokens, seed 0, 5m12s on 2 CPU cores."
    )
    assert summary({}) == ""


def test_report_imports_no_jax():
    code = "import sys, kdjax.analysis.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
