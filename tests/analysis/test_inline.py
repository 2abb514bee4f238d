"""Parts of a report inside a notebook."""

import html
import json
import re

import pytest

from kdjax.analysis import write_report
from kdjax.analysis.inline import show


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {9 - s}}}\n' for s in range(1, 5)))
    said = [{"prompt": '"><script>x', "before": "a", "after": "b", "teacher": "c"}]
    (tmp_path / "report_data.json").write_text(json.dumps({"completions": said}))
    return tmp_path


def framed(inline):
    """The page that a browser reads out of the frame's attribute."""
    (attribute,) = re.findall(r'srcdoc="([^"]*)"', inline._repr_html_())
    return html.unescape(attribute)


def test_a_section_alone(workdir):
    page = framed(show(workdir, "curves"))
    assert page.startswith("<!doctype html>")
    assert "Training loss" in page
    assert "<style>" in page
    assert "Completions" not in page


def test_all_of_it_is_the_report(workdir):
    assert framed(show(workdir)) == write_report(workdir).read_text()


def test_what_a_model_writes_stays_inside_the_frame(workdir):
    frame = show(workdir, "completions", height=123)._repr_html_()
    assert frame.count("<") == 2  # <iframe ...></iframe>
    assert "height:123px" in frame
    assert "<script>x" not in framed(show(workdir, "completions"))


def test_bad_input(workdir, tmp_path_factory):
    with pytest.raises(ValueError, match="names must be sections of the report, got 'curve'. Did you mean 'curves'?"):
        show(workdir, "curve")
    with pytest.raises(ValueError, match="workdir must be the directory of a run"):
        show(tmp_path_factory.mktemp("empty"))
