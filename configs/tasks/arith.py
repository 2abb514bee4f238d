"""Small sums, questions with pass rates between 0 and 1 for a model of 135M parameters, and who answers them.

Command:   python -m launch.generate --config=configs/tasks/arith.py --model=student --samples=8 --out=runs/p/rollouts
Hardware:  2 CPU cores, 3 GiB of memory
Time:      about 5 minutes, reckoned from 304 answers (6,708 tokens) in 77 seconds of processor time
Result:    rollouts.jsonl and manifest.json in --out; another start goes on with what is missing

The student is SmolLM2-135M-Instruct, dequantised from Q4_1, itself; --workdir=runs/x takes the student of a run. A
teacher behind an OpenAI-compatible endpoint: --model=served --config.served.base_url=http://localhost:8000/v1
--config.served.model=<its name there>, and its key in the environment variable OPENAI_API_KEY if it wants one.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """400 questions of four kinds, eight answers each at temperature 0.7."""
    config = default_config()
    config.name = "arith"
    config.teacher.path = "smollm2-135m"
    config.student.path = "smollm2-135m"
    config.prompts.path = "arith"
    config.prompts.size = 400
    config.prompts.instruction = " Reply with the answer only."
    config.generation.samples = 8
    config.generation.new_tokens = 32
    config.generation.temperature = 0.7
    return config
