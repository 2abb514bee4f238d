"""Checkpoints of a run: state and identity, saved asynchronously; the only importer of orbax.

The data position is the step itself, and arrays are stored whole: a run may go on with other devices and processes.
Every process of a run has to save, restore and close; together they write one checkpoint. What they must agree on
before that is here too.

A step is written to a temporary folder and renamed when complete, so a kill at any moment leaves the previous one.
Kept are the newest `keep` and the `keep_best` of lowest held-out KL among the evaluated ones.
"""

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax.config import Checkpoint

BEST = "kl"  # the metric that `keep_best` goes by; lower is better
SHARED_SECONDS = 10.0  # until what one host wrote has to be seen by the others


class Checkpoints:
    """The checkpoints of one work directory; a context manager that waits for pending writes when it closes.

    read_only: only look; half-written checkpoints are left alone, because a run may be writing them at this moment.
    """

    def __init__(self, workdir: Path, config: Checkpoint, *, read_only: bool = False) -> None:
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(n=config.keep)]
        if config.keep_best:
            # BestN keeps the largest.
            rated = {"get_metric_fn": lambda metrics: -metrics[BEST], "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(**rated, n=config.keep_best))
        self.directory = workdir / "checkpoints"
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        self._orbax: ocp.training.Checkpointer = ocp.training.Checkpointer(
            self.directory.absolute(),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
        )
        self._pending: tuple[int, Any] | None = None  # the step that is being written, and its response

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out KL among those that are still there, or None if none was evaluated."""
        rated = [c for c in self._orbax.checkpoints if c.metrics]
        return min(rated, key=lambda c: c.metrics[BEST]).step if rated else None

    def save(self, step: int, state: Any, identity: str, kl: float | None = None) -> None:
        """Start writing `state` and the config fingerprint `identity`.

        Returns as soon as the arrays are copied. Raises OSError that names the step and the last good checkpoint if the
        disk cannot hold it or an earlier write failed.
        """
        self.wait()
        if step in [c.step for c in self._orbax.checkpoints]:
            return
        self._require_space(step, state)
        parts = {"state": state, "meta": {"config": identity}}
        metrics = None if kl is None else {BEST: float(kl)}
        try:
            self._pending = step, self._orbax.save_checkpointables_async(step, parts, force=True, metrics=metrics)
        except OSError as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Until the pending write is complete. Raises OSError as `save` does."""
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            try:
                response.result()
            except (OSError, ValueError, RuntimeError) as error:  # tensorstore reports a full disk as ValueError
                raise self._failed(step, error) from error

    def restore(self, abstract_state: Any, identity: str, step: int | None = None) -> tuple[Any, int]:
        """(state, step): the newest checkpoint, or that of `step`, onto the shardings of `abstract_state`.

        It may have been written by other devices or processes. Raises ValueError if there is none, or it is of another
        config.
        """
        self.wait()
        wanted_step = self.latest if step is None else step
        known = [c.step for c in self._orbax.checkpoints]
        if wanted_step is None or wanted_step not in known:
            raise ValueError(f"step must be one of the saved ones {known} in {self.directory}, got {wanted_step}.")
        step = wanted_step
        found = self._orbax.load_checkpointables(step, {"meta": None})["meta"]["config"]
        if found != identity:
            raise ValueError(
                f"{self.directory} must hold checkpoints of this config and data ({identity}), got those of {found}. "
                "Set another --workdir, or the config the run was started with (config.json beside it)."
            )
        return self._orbax.load_checkpointables(step, {"state": abstract_state})["state"], step

    def close(self) -> None:
        """Wait for pending writes and release the directory."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except (OSError, ValueError, RuntimeError) as second:  # orbax repeats what a failed write has said already
            if error is None:
                raise
            error.add_note(f"and on closing {self.directory}: {second}")

    def _require_space(self, step: int, state: Any) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._failed(step, OSError(f"it needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"))

    def _failed(self, step: int, error: Exception) -> OSError:
        good = "none is saved yet" if self.latest is None else f"the last good one is of step {self.latest}"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {error}; {good}. Free disk space "
            "or lower checkpoint.keep, then run the same command again to go on from there."
        )


def abstract_like(state: Any) -> Any:
    """Shapes, dtypes and shardings of a live state: what `restore` needs."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def config_difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """'data.seq_len is 128 there and 256 here' for every leaf that differs."""
    found = []
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += config_difference(left, right, f"{path}{key}.")
        elif left != right:
            found.append(f"{path}{key} is {left!r} there and {right!r} here")
    return found


def agreed(value: int) -> int:
    """What process 0 has here, in all processes. All have to call; so a late file on one of them sends none astray."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def by_first(work: Callable[[], Any]) -> Any:
    """What `work`, which process 0 alone does, returns there, in all processes: anything that JSON has.

    A ValueError or OSError of it is raised in all of them. All have to call.
    """
    if jax.process_count() == 1:
        return work()
    said, failed = b"", None
    if jax.process_index() == 0:
        try:
            said = json.dumps({"found": work()}).encode()
        except (ValueError, OSError) as error:
            failed = error
            said = json.dumps({"failed": str(error)}).encode()
    room = np.zeros(agreed(len(said)), np.uint8)
    room[: len(said)] = np.frombuffer(said, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(room)).tobytes())
    if failed is not None:
        raise failed
    if "failed" in told:
        raise ValueError(told["failed"])
    return told["found"]


def require_same(text: str, what: str) -> None:
    """Raises ValueError that names the processes in which `text` is another than in process 0. All have to call."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    every = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((every != every[:1]).any(1)).tolist()
    if others:
        raise ValueError(
            f"{what} must be the same in all processes, got another than that of process 0 in process "
            f"{', '.join(map(str, others))}; they would wait for each other for ever. Start all with the same command, "
            "versions and files."
        )


def require_shared(workdir: Path) -> None:
    """Raises ValueError that names the processes that do not see the directory of process 0. All have to call."""
    if jax.process_count() == 1:
        return
    mark = workdir / f".seen-by-all-{agreed(secrets.randbits(31))}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("the mark is made")
    try:
        require_seen(mark.exists, workdir)
    finally:
        if jax.process_index() == 0:
            mark.unlink()


def require_seen(there: Callable[[], bool], workdir: Path) -> None:
    """Until what process 0 wrote in `workdir` is `there` in all processes; some disks take their time.

    Raises ValueError that names the processes in which it is not. All have to call.
    """
    if jax.process_count() == 1:
        return
    end = time.monotonic() + SHARED_SECONDS
    while not (found := there()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(found))).tolist()
    if blind:
        raise ValueError(
            f"--workdir must be one directory that all processes see, got {str(workdir)!r}, in which process "
            f"{', '.join(map(str, blind))} does not find what process 0 writes. Set it to a path on a shared disk."
        )
