"""What is measured of a model on held-out text: figures with intervals, and the page of text for the report."""

from kdjax.evals.evaluation import Calibration, Estimate, Evaluation, Figures, summarise
from kdjax.evals.heldout import evaluate, make_eval_step
from kdjax.evals.text_page import entropy_page, make_page_step

__all__ = [
    "Calibration",
    "Estimate",
    "Evaluation",
    "Figures",
    "entropy_page",
    "evaluate",
    "make_eval_step",
    "make_page_step",
    "summarise",
]
