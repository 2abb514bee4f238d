"""Where in a response the answer stands: a box, after "the answer is", or the whole of it."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# "the answer is", "Final answer:", "the answer to the riddle would be", "#### 7"
_MARKER = re.compile(
    r"####|\banswers?\b(?:[ ]+(?:to|for|of)\b[^.\n:=]{0,60}?)?\W{0,4}?(?:\b(?:is|are|equals|would be|must be)\b|[:=])",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\W*(?:not|never|neither)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_EMPHASIS = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])|(?<!\w)__|__(?!\w)|`")


def final_part(response: str) -> str:
    """The response after its thoughts, stripped; "" if they are not finished."""
    _, closed, rest = response.rpartition("</think>")
    if closed:
        return rest.strip()
    return "" if "<think>" in response else response.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or <answer>...</answer>), braces balanced; None if there is none.

    Raises EOFError if that box is not closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        tags = _TAG.findall(text)
        return tags[-1].strip() if tags else None
    start = boxes[-1].end()
    if not boxes[-1]["brace"]:  # \boxed 7
        return (text[start:].split() or [""])[0].strip("$")
    depth, at = 1, start
    while at < len(text):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
        at += 2 if text[at] == "\\" else 1
    raise EOFError("the last box is not closed")


def announced(text: str) -> str | None:
    """The content of the last box, else what is stated as the answer; None if there is neither. Raises as these do."""
    content = boxed(text)
    return stated(text) if content is None else content


def stated(text: str) -> str | None:
    """What follows the last "the answer is" (or "answer:", "####") up to the end of the sentence; None if nowhere.

    Of "the answer is not 4" nothing is stated. An answer in the line below counts. Raises EOFError if nothing follows.
    """
    text = _EMPHASIS.sub("", text)
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :]
    if _NEGATED.match(rest):
        return None
    if not rest.strip(" \t\n:="):
        raise EOFError("the response stops before the answer")
    line = rest.lstrip(" \t:=").lstrip().split("\n")[0]
    end = _SENTENCE_END.search(line)
    return (line[: end.start()] if end else line).strip()


def plain(text: str) -> str:
    """Without emphasis, formula marks, quotation marks around it and the full stop at its end."""
    text = _EMPHASIS.sub("", text).strip()
    text = re.sub(r"^(?:\\\(|\\\[|\$+)\s*|\s*(?:\\\)|\\\]|\$+)$", "", text)
    text = re.sub(r"^\\text\w*\{([^{}]*)\}$", r"\1", text)
    text = re.sub(r"(?<=[^.\s])\.$", "", text.strip())
    for opening, closing in ('""', "''", "\u201c\u201d", "\u2018\u2019", "«»"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing:
            text = text[1:-1]
    return re.sub(r"(?<=[^.\s])\.$", "", text).strip()
