"""How several processes become one run; `join` goes before anything asks JAX for devices.

  one process        nothing to set
  TPU pod or slices  the same command on every host (launch.tpu_vm run); who is who is asked of the machine
  SLURM              srun python -m launch.train ...: one task per GPU
  by hand            --coordinator=<host of process 0>:<free port> --processes=2 --process=0, and --process=1 elsewhere;
                     with several on one host set CUDA_VISIBLE_DEVICES, or JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4

All processes see the same --workdir, have the same config and text, and a mesh over the devices of all (mesh.preset).
"""

import ctypes
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

LOST = 4  # the exit code if another process is lost
NAMES = ("coordinator", "processes", "process")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what jax reads
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"

flags.disclaim_key_flags()

_handlers: list[Any] = []  # what C code calls must not be collected


def define() -> None:
    """The flags of a script that several processes may run together."""
    flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0.")
    flags.DEFINE_integer("processes", None, "Several processes: how many; 1 = this one alone, wherever it runs.")
    flags.DEFINE_integer("process", None, "Several processes: which of them this is, from 0.")
    flags.DEFINE_integer("wait_seconds", 300, "Several processes: how long to wait for all to start.", lower_bound=1)
    flags.DEFINE_integer("lost_seconds", 100, "Several processes: silent for so long, one is lost.", lower_bound=5)


def join() -> None:
    """Become one of the processes of this run, if there are several; else nothing happens.

    Raises ValueError that names the flag to set. If the others do not come, or one is lost later, the process ends with
    exit code LOST and says so.
    """
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        return
    given = {name: flags.FLAGS[name].value for name in NAMES}
    arguments = settings(given, os.environ, tpu_chips(), on_tpu_vm)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        _require_free(arguments["coordinator_address"])
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from kdjax/loop.py
    wait, lost = flags.FLAGS.wait_seconds, flags.FLAGS.lost_seconds
    said = " ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
    _say_on_abort(
        f"error: the processes did not find each other within {wait} s{f', with {said}' if said else ''}. Each needs "
        "the same --coordinator, an address of the host of process 0 that all can reach, the same --processes and a "
        "--process of its own; start all of them, or raise --wait_seconds."
    )
    jax.distributed.initialize(
        **arguments, initialization_timeout=wait, heartbeat_timeout_seconds=lost, shutdown_timeout_seconds=wait
    )
    _say_on_abort(
        "error: another process of this run is lost or failed; its own output, or the lines above, say which and why. "
        "What is saved stands. Start all processes again with the same command to go on from there."
    )
    count, wanted = jax.process_count(), arguments.get("num_processes")
    if wanted not in (None, count):
        raise ValueError(f"--processes must be the same in all processes, got {wanted} here and {count} in process 0.")
    if count > 1 and jax.process_index() == 0:
        print(f"{count} processes, {jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr, flush=True)


def settings(
    given: Mapping[str, Any], environment: Mapping[str, str], chips: bool, asked: Callable[[], bool]
) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`: {} = it finds out by itself, None = one process, no call.

    given: `NAMES` and their values. chips: whether TPUs are here. asked: whether the machine says it is a TPU VM; slow.
    """
    if given["processes"] == 1:
        return None
    if any(value is not None for value in given.values()):
        return _by_hand(given)
    if all(name in environment for name in SLURM):
        return {} if int(environment["SLURM_NTASKS"]) > 1 else None
    if not chips:
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    several = "," in (hosts or "") or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return {} if several or (hosts is None and "TPU_SKIP_MDS_QUERY" not in environment and asked()) else None


def _by_hand(given: Mapping[str, Any]) -> dict[str, Any]:
    missing = " and ".join(f"--{name}" for name, value in given.items() if value is None)
    if missing:
        raise ValueError(
            f"--coordinator, --processes and --process must be set together, got no {missing}. Set --coordinator to "
            "host:port of process 0, --processes to their number and --process to that of this one, from 0."
        )
    address, count, index = (given[name] for name in NAMES)
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/]+):\d{1,5}", address):
        raise ValueError(f"--coordinator must be host:port of process 0, got {address!r}. Write 10.0.0.1:1234.")
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"--process must be in 0..{max(count, 1) - 1} with --processes={count}, got {index}; every process has a "
            "number of its own. Change one of them."
        )
    who = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return who | {"cluster_detection_method": "deactivate"}


def tpu_chips() -> bool:
    """Whether this machine has TPUs, by the vendor of its PCI devices."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def nvidia_gpus() -> bool:
    """Whether this machine has NVIDIA GPUs, by their device files; those of a Windows host count."""
    return any(Path("/dev").glob("nvidia*")) or Path("/dev/dxg").exists()


def on_tpu_vm() -> bool:
    """Whether the cloud's metadata server says that this is a worker of a TPU VM."""
    try:
        request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:  # no such server
        return False


def several() -> bool:
    """Whether this is one of several processes of a run."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process speaks and writes for all."""
    return not several() or place()[0] == 0


def say(text: str) -> None:
    """Once, however many processes there are."""
    if first():
        print(text)


def place() -> tuple[int, int]:
    """(which of the processes this is, how many there are)."""
    import jax

    return jax.process_index(), jax.process_count()


def gathered(array: Any) -> Any:
    """[P, ...]: this NumPy array of each of the P processes. All have to call."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array)


def wait(what: str) -> None:
    """Until all processes are here."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def leave(code: int) -> None:
    """End this process of several at once, after an error. Waiting for the others, who wait for this one, would hang.

    They find out by its silence. Process 0, on whom the others depend, first lets those speak that fail alike.
    """
    if first():
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _require_free(address: str) -> None:
    """jaxlib crashes without a word if the port is taken."""
    port = int(address.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--coordinator must name a free port of this host, got {address!r}; {error}. Choose another port."
        ) from error


def _say_on_abort(message: str) -> None:
    """Make `message` the last line if jaxlib aborts the process, which is how it ends one that others have left.

    A Python signal handler would come too late: it runs in the main thread, which waits for the device.
    """
    if os.name != "posix":
        return

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        os.write(2, (message + "\n").encode())
        os._exit(LOST)

    _handlers.append(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
