"""The held-out figures of a student at any time: on text, and on prompts that it answers."""

import dataclasses

from kdjax.build import Built, student_speaker
from kdjax.data import heldout_batches, to_batch
from kdjax.data.prompts import Prompt, load_prompts, split_prompts
from kdjax.data.responses import prompt_ids
from kdjax.evals.accuracy import Accuracy, accuracy
from kdjax.evals.evaluation import Evaluation
from kdjax.evals.heldout import evaluate, make_eval_step
from kdjax.generation.batching import LENGTH, rollouts
from kdjax.generation.sampling import Sampling
from kdjax.step import feed_of
from kdjax.types import Params
from kdjax.verifiers import check_prompts, verify


class Heldout:
    """heldout(params) -> Evaluation of them and of the teacher, on `eval.rows` rows and `eval.prompts` prompts.

    Programs are compiled once. Raises ValueError if prompts are asked for that are not there.
    """

    def __init__(self, built: Built) -> None:
        self._built = built
        self._step = make_eval_step(built.parts.student, built.parts.teacher, built.rules)
        self._feed = feed_of(built.parts.teacher)
        self._prompts = heldout_prompts(built) if built.experiment.eval.prompts else []

    def __call__(self, params: Params) -> Evaluation:
        """Figures of `params`; its answers are the most likely ones."""
        config, rules = self._built.experiment.eval, self._built.rules
        size = -(-config.batch_size // rules.batch_shards) * rules.batch_shards
        rows = heldout_batches(self._built.data.heldout, size, config.rows)
        batches = (self._feed(to_batch(columns, rules)) for columns in rows)
        found = evaluate(self._step, params, self._built.teacher_params, batches)
        return dataclasses.replace(found, answers=self._answers(params)) if self._prompts else found

    def _answers(self, params: Params) -> Accuracy:
        built, e = self._built, self._built.experiment
        model = student_speaker(built, params)
        ids = [
            prompt_ids(prompt, built.tokenizer, chat_template=e.data.chat_template, system_prompt=e.data.system_prompt)
            for prompt in self._prompts
        ]
        said = rollouts(
            model,
            ids,
            1,
            Sampling(temperature=0),
            new_tokens=e.generation.new_tokens,
            stop=e.generation.stop,
            batch_size=e.generation.batch_size,
        )
        default = e.prompts.verifier
        return accuracy(
            [verify(one.text, self._prompts[at], default, cut_off=one.finish == LENGTH) for at, _, one in said]
        )


def heldout_prompts(built: Built) -> list[Prompt]:
    """The first `eval.prompts` held-out prompts."""
    e = built.experiment
    held = (
        list(built.asked.heldout) if built.asked is not None else split_prompts(load_prompts(e.prompts), e.prompts)[0]
    )
    if len(held) < e.eval.prompts:
        raise ValueError(
            f"eval.prompts must be at most the {len(held)} prompts that are held out, got {e.eval.prompts}. Lower it, "
            "or raise prompts.size or prompts.heldout_fraction."
        )
    check_prompts(held[: e.eval.prompts], e.prompts.verifier)
    return held[: e.eval.prompts]
