"""The choices of the code released with SCAS at once (arXiv 2605.26872), and what stays otherwise."""

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

    Where data.system_prompt is empty, `config.from_config_dict` sets it to the released system text: S depends on it.

    Not reproduced:

    - The blanks that an answer begins with. There it keeps them, and where its first token swallows the prompt's end,
      the prompt ends earlier for this answer; here they are left out, and all answers to a question follow one prompt.
    - A second mark of the beginning, of tokenizers that put one before the template's own.
    - The choice of a d_Q without the header of the assistant's turn; it is with it, as is the default there.
    - The score 0 of an answer without ordinary tokens, which would be selected.
    - One verifier for all questions; prompts.verifier="released_rule" is it.
    """
    return dataclasses.replace(settings, **OFFICIAL) if settings.official else settings
