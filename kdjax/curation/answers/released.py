"""All choices of the code released with SCAS at once (arXiv 2605.26872)."""

import dataclasses
from typing import Any

from kdjax import config

OFFICIAL: dict[str, Any] = {
    "alignment": "token",
    "trailing": "keep",
    "truncated": "keep",
    "duplicates": "all",
    "identical": "all",
    "loops": 1.0,
    "small_pool": "official",
}


def as_released(settings: config.Answers) -> config.Answers:
    """The settings; with answers.official the fields below are as the released code has them, whatever they say.

    | field                | released                                         | here                                |
    |----------------------|--------------------------------------------------|-------------------------------------|
    | alignment            | token: activations where a token is read         | the same                            |
    | trailing             | keep: a newline after the end token is scored    | drop                                |
    | truncated            | keep: longer answers train cut off (but there    | drop: what is cut off may lack its  |
    |                      | they are scored whole, here as they are trained) | result                              |
    | duplicates           | all rows of a teacher compete                    | first: the first right one          |
    | identical            | all equal texts of several teachers compete      | first: of the first teacher by name |
    | loops                | 1: answers that repeat themselves compete, and   | 0.5                                 |
    |                      | S prefers them                                   |                                     |
    | small_pool           | official: a question whose group is empty is     | nearest: the group next to it       |
    |                      | dropped, always so with one answer               |                                     |

    Not reproduced, because a failure would be selected: the score 0 of an answer without ordinary tokens. The released
    verifier is prompts.verifier="released_rule".
    """
    return dataclasses.replace(settings, **OFFICIAL) if settings.official else settings
