"""What the base experiments of the studies here share; each adds its student, its data and its training."""

from ml_collections import ConfigDict

from kdjax.config import default_config


def base_config() -> ConfigDict:
    """SmolLM2-135M-Instruct teaches, Factbook text is held out, and each of many runs keeps little."""
    config = default_config()
    config.teacher.path = "smollm2-135m"
    config.data.path = "factbook"
    config.eval.rows = 8
    config.eval.completions = 0
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = 0
    config.checkpoint.every = 200
    config.log.tensorboard = False
    return config
