"""What a run does between its steps: held-out figures, the student's own answers, the data of its report."""
