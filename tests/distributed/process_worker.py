"""Launch scripts one after the other in one process, which may be one of several.

process_worker.py FOLDER SCENES FLAG...: two processes that go through the scenes together but for the last, which the
second sleeps through. What they say is in FOLDER; printed are the id of each and, when it ends, "number code seconds".
"""

import gc
import importlib
import json
import os
import pathlib
import sys
import time

from tests.launch import launched


def begin(index, folder, scenes, arguments):
    """Process `index` of the two, as a copy of this one; its id."""
    child = os.fork()
    if child:
        return child
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{index}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for number, (script, *own) in enumerate(scenes):
        if index and number == len(scenes) - 1:  # until somebody ends it
            time.sleep(600)
        launched.run(script, *own, *arguments, f"--process={index}")
        print(f"{script} {number} is done", flush=True)
    sys.exit()


def watch(folder, scenes, *arguments):
    """Both, and how they end. What they import is imported once; JAX starts in each of them."""
    for name in ("kdjax.loop", "kdjax.offline", "kdjax.run.answers", "orbax.checkpoint", "grain"):
        importlib.import_module(name)
    importlib.import_module("kdjax.models.synthetic").make_tokenizer()
    gc.freeze()
    gc.disable()  # tracing makes much garbage, and they live for a minute
    started = [begin(index, pathlib.Path(folder), json.loads(scenes), arguments) for index in range(2)]
    print(*started, flush=True)
    for _ in started:
        child, status = os.wait()
        print(started.index(child), os.waitstatus_to_exitcode(status), time.monotonic(), flush=True)


if __name__ == "__main__":
    watch(*sys.argv[1:])
