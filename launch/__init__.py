"""Thin command-line scripts: flags -> build -> one call. Run them as `python -m launch.<name>`."""
