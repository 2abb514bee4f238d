"""Formulas: what is decided without math-verify, with one of our own in its place, and with the real one."""

import importlib.util
import threading

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import VERIFIERS, worker

symbolic = VERIFIERS["symbolic"]

# Texts with an "n" are not read; equal are those of the same letters. The rest is what a library may do wrong.
FAKE = """
import os, time
def parse(text, parsing_timeout, raise_on_error):
    assert text[0] == text[-1] == "$" and parsing_timeout is None
    text = text[1:-1]
    if text == "sleep": time.sleep(100)
    if text == "die": os._exit(3)
    if text == "print": print("noise on stdout", flush=True)
    if text == "memory": bytearray(8 << 30)
    return [text] if "n" in text else [sorted(text), text]
def verify(gold, target, timeout_seconds, raise_on_error):
    if target[1] == "raise": raise ValueError("cannot compare")
    return gold[0] == target[0]
"""


def judged(gold, response):
    return symbolic(response, Prompt("p", "?", gold))


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("x+1", "The answer is $x + 1$.", "right"),
        (r"\left(1, 2\right)", r"\boxed{(1,\,2)}", "right"),
        ("0.5", r"\boxed{\frac{1}{2}}", "right"),
        ("1/3", "0.333333", "wrong"),  # math-verify rounds to 6 places
        ("7", "17", "wrong"),
        ("x+1", "", "wrong"),
        ("x+1", r"\boxed{}", "wrong"),
        ("x+1", r"\boxed{x+", "undecided"),
        ("x+1", "1+x", "undecided"),
        ("x+1", "x" * 2000, "undecided"),
    ],
)
def test_without_the_package_equal_texts_and_numbers_are_decided(absent, gold, response, expected):
    assert judged(gold, response).verdict == expected


def test_the_reason_says_what_to_install(absent):
    assert judged("x+1", "1+x").reason == 'math-verify is not installed: pip install "math-verify[antlr4_13_2]"'


def test_what_the_package_says_is_asked_in_a_process_that_stays(package):
    package("math_verify", FAKE)
    assert judged("x+1", r"so \boxed{1+x}").verdict == "right"
    process = worker._workers["symbolic"].pid
    assert judged("x+1", "2+x").verdict == "wrong"
    assert judged("pirt", "Let us see.\nprint").verdict == "undecided"
    assert judged("x+1", "no idea").reason == "math-verify cannot read 'no idea'"
    raised = judged("x+1", "raise")
    assert (raised.verdict, raised.reason) == ("undecided", "math-verify: ValueError: cannot compare")
    memory = judged("x+1", "memory")
    assert (memory.verdict, memory.reason) == ("undecided", "math-verify: MemoryError: ")
    assert worker._workers["symbolic"].pid == process


def test_neither_a_hang_nor_a_crash_is_for_ever(package, monkeypatch):
    package("math_verify", FAKE)
    assert judged("x", "y").verdict == "wrong"  # it has started: the limit does not count that
    monkeypatch.setattr("kdjax.verifiers.formulas.SECONDS", 0.5)
    assert judged("x", "sleep").reason == "math-verify: it took longer than 0.5 s"
    assert judged("x", "die").reason == "math-verify: the process that checks ended: exit status 3"
    monkeypatch.setattr("kdjax.verifiers.formulas.SECONDS", 20.0)
    assert judged("x+1", "1+x").verdict == "right"


def test_a_package_that_cannot_be_imported_is_told(package):
    package("math_verify", "raise RuntimeError('broken')")
    assert judged("x+1", "1+x").reason.endswith("RuntimeError: broken")


def test_threads_take_turns(package):
    package("math_verify", FAKE)
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: judged("x+1", "1+x" if n % 2 else "2+x").verdict}))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: "right" if n % 2 else "wrong" for n in range(8)}


def test_no_key_reaches_the_process(package, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    package("math_verify", FAKE.replace("return [text]", "raise OSError(sorted(os.environ)); return [text]"))
    assert "PYTHONPATH" in judged("x+1", "n").reason
    assert "OPENAI_API_KEY" not in judged("x+1", "n").reason


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("x+1", "1+x", "right"),
        ("x+1", "x+2", "wrong"),
        ("x^2-1", "(x-1)(x+1)", "right"),
        (r"\sqrt{2}/2", r"\boxed{\frac{1}{\sqrt{2}}}", "right"),
        ("7", "3+4", "right"),
        (r"2\pi", r"\boxed{2\pi}", "right"),
        (r"\{1,2\}", r"\{2,1\}", "right"),
        ("(1,2)", "(2,1)", "wrong"),
        ("x+1", r"\boxed{__import__('os').getcwd()}", "undecided"),
    ],
)
def test_the_real_package(gold, response, expected):
    assert judged(gold, response).verdict == expected
