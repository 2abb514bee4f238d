"""The answer axis: of all teachers' verified answers to a question, those that this student learns from.

Files of a workdir's `answers/`, each made from the one before: a pool (pool.py) -> admitted.jsonl (verify.py) ->
scored-<student>.jsonl (scorer.py reads the answers, scored.py keeps their figures) -> selected.jsonl (selected.py, by
the policies of select.py). Where teachers are rated by gradients, gradients-<student>.jsonl (best_teacher.py).
"""
