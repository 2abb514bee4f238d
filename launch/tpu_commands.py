"""The command lines of launch.tpu_vm: pure functions from what is wanted to the arguments of `gcloud`.

Facts of gcloud that shape them: a request of one slice takes a node id, of several a count and a prefix; ssh and scp to
a queued resource reach all workers of all slices; `stop` of a TPU is not for slices of several workers.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence

# The documented software versions for JAX ("TPU software versions" in Cloud TPU's documentation).
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
OTHER_NAMES = {"v5e": "v5litepod", "v5lite": "v5litepod", "v6": "v6e", "v5": "v5p or v5litepod"}
QUEUE = ("gcloud", "compute", "tpus", "queued-resources")
EVERYWHERE, FIRST = ("--node=all", "--worker=all"), ("--node=0", "--worker=0")
REPORT = re.compile(r"^kdjax-run (\S+) (\S+)$", re.MULTILINE)  # worker, what its run does
# What runs on a worker. kdjax-run is the name of the process that keeps the exit code; its process group is the run.
HERE = "cd ~/kdjax/runs/tpu_vm 2>/dev/null"
GOING = 'pid=$(cat pid 2>/dev/null) && grep -qa kdjax-run "/proc/$pid/cmdline" 2>/dev/null'
REFUSED = f'if {GOING}; then echo "a run is going on: stop it first" >&2; exit 1; fi'


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A queued resource: `slices` slices of one type under one name."""

    name: str
    type: str = ""
    zone: str = ""
    project: str = ""
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    runtime: str = ""
    create_flags: tuple[str, ...] = ()
    ssh_flags: tuple[str, ...] = ()


def checked(tpu: Tpu, *, rents: bool) -> Tpu:
    """The same, if its words are of the form that Google Cloud takes. rents: it will be created."""
    forms = {
        "name": (r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and -, a letter first, at most 63"),
        "zone": (r"([a-z]+-[a-z]+\d+-[a-z])?", "a zone such as us-west4-a"),
        "project": (r"(([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9])?", "a project id such as my-project-1"),
    }
    for flag, (form, wanted) in forms.items():
        value = getattr(tpu, flag)
        if not re.fullmatch(form, value):
            raise ValueError(f"--{flag} must be {wanted}, got {value!r}.")
    if tpu.slices < 1:
        raise ValueError(f"--slices must be at least 1, got {tpu.slices}.")
    if tpu.spot and tpu.reserved:
        raise ValueError("--spot must not be set with --reserved, got both; capacity is one or the other. Drop one.")
    if rents:
        runtime_version(tpu.type)
    return tpu


def runtime_version(kind: str) -> str:
    """The software version for a TPU type such as v5litepod-16. Raises ValueError for what cannot be rented so."""
    family, dash, size = kind.partition("-")
    if family.startswith(("tpu7", "v7")):
        raise ValueError(f"--type must be one of the Cloud TPU API, got {kind!r}; TPU7x is rented through Kubernetes.")
    if family in RUNTIMES and dash and re.fullmatch(r"[1-9]\d*", size):
        return RUNTIMES[family]
    hint = f" Write {OTHER_NAMES[family]}-{size or 'N'}." if family in OTHER_NAMES else ""
    raise ValueError(f"--type must be one of {', '.join(f'{name}-N' for name in RUNTIMES)}, got {kind!r}.{hint}")


def _place(tpu: Tpu) -> list[str]:
    return [f"--{flag}={value}" for flag in ("zone", "project") if (value := getattr(tpu, flag))]


def create_line(tpu: Tpu) -> list[str]:
    """Ask for the slices. They are there when the state is ACTIVE."""
    nodes = [f"--node-id={tpu.name}"]  # a count must be above 1
    if tpu.slices > 1:
        nodes = [f"--node-count={tpu.slices}", f"--node-prefix={tpu.name}"]
    what = [f"--accelerator-type={tpu.type}", f"--runtime-version={tpu.runtime or runtime_version(tpu.type)}"]
    capacity = ["--spot"] * tpu.spot + ["--reserved"] * tpu.reserved
    return [*QUEUE, "create", tpu.name, *nodes, *what, *_place(tpu), *capacity, *tpu.create_flags]


def describe_line(tpu: Tpu) -> list[str]:
    """Print the state."""
    return [*QUEUE, "describe", tpu.name, *_place(tpu), "--format=value(state.state)"]


def delete_line(tpu: Tpu) -> list[str]:
    """Delete the slices and the request; returns when they are gone."""
    return [*QUEUE, "delete", tpu.name, *_place(tpu), "--force", "--quiet"]


def ssh_line(tpu: Tpu, script: str, where: Sequence[str] = EVERYWHERE) -> list[str]:
    """Run a shell line on workers."""
    return [*QUEUE, "ssh", tpu.name, *where, *_place(tpu), *tpu.ssh_flags, f"--command={script}"]


def archive(tpu: Tpu) -> str:
    """Where the copied files are kept, from the root of the repository; a restart sends these again."""
    return f"runs/tpu_vm/{tpu.name}.tar.gz"


def pack_line(tpu: Tpu) -> list[str]:
    """Pack the tracked files as they are now, commit or not (`git stash create` names them and changes nothing)."""
    tree = 'tree=$(git stash create) && git archive --format=tar.gz --output="$0" "${tree:-HEAD}"'
    return ["sh", "-c", f"mkdir -p runs/tpu_vm && {tree}", archive(tpu)]


def send_line(tpu: Tpu) -> list[str]:
    """Send the archive to every worker."""
    return [*QUEUE, "scp", archive(tpu), f"{tpu.name}:kdjax.tar.gz", *EVERYWHERE, *_place(tpu), *tpu.ssh_flags]


def install_script(python: str, setup: str) -> str:
    """The tree anew (runs/ and .venv stay), then the pinned packages with the TPU extra of the pinned JAX.

    uv brings a Python that the machine's system may not have.
    """
    steps = [
        f"{HERE} && {REFUSED}",
        "set -e",
        "mkdir -p ~/kdjax",
        "cd ~/kdjax",
        "find . -mindepth 1 -maxdepth 1 ! -name runs ! -name .venv -exec rm -rf {} +",
        "tar -xzf ~/kdjax.tar.gz",
        "export PATH=~/.local/bin:$PATH",
        "command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
        f"test -x .venv/bin/python || uv venv --quiet --python={shlex.quote(python)} .venv",
        "uv pip install --quiet --python=.venv/bin/python -r requirements.txt 'jax[tpu]'",
    ]
    return "; ".join([*steps, *([setup] if setup else [])])


def start_script(command: str) -> str:
    """Start the line in a session of its own and return; refuses a second run.

    A TERM reaches all of it: what runs may save, what would follow is left out, and the exit code is 143.
    JAX_PLATFORMS: no silent run on the CPU of a worker whose TPU does not answer.
    """
    keeper = (
        "trap : TERM; . .venv/bin/activate; export PYTHONUNBUFFERED=1 JAX_PLATFORMS=tpu,cpu; "
        '(trap "exit 143" TERM; eval "$1"); echo $? >runs/tpu_vm/exit'
    )
    return (
        'mkdir -p ~/kdjax/runs/tpu_vm; test -x ~/kdjax/.venv/bin/python || { echo "nothing is installed: copy first" '
        f">&2; exit 1; }}; {HERE} && {REFUSED}; rm -f exit stopped; cd ~/kdjax; "
        f"setsid bash -c {shlex.quote(keeper)} kdjax-run {shlex.quote(command)} </dev/null >>runs/tpu_vm/log 2>&1 & "
        "echo $! >~/kdjax/runs/tpu_vm/pid"
    )


def stop_script() -> str:
    """TERM to the run, and wait up to ten minutes until it has saved and ended."""
    wait = f"for i in $(seq 600); do {GOING} || break; sleep 1; done"
    return f'{HERE} && if {GOING}; then touch stopped; kill -TERM -- "-$pid"; {wait}; fi; {report_script()}'


def report_script() -> str:
    """Print `kdjax-run <worker> running|stopped|lost|none|<exit code>`."""
    states = f"if {GOING}; then echo running; elif ! test -e pid; then echo none; elif ! test -e exit; then echo lost; "
    states += "elif test -e stopped; then echo stopped; else cat exit; fi"
    return f"{HERE}; echo kdjax-run $(hostname) $({states})"


def logs_script(lines: int, follow: bool) -> str:
    """The end of the log."""
    return f"tail -n {lines}{' -F' * follow} ~/kdjax/runs/tpu_vm/log"


def local_workdir(command: str) -> str:
    """The --workdir of the line if it is on a worker's own disk, which goes with the worker; else ''.

    Runs write to folders, so a gs:// name is no bucket to them: mounted ones are looked for under /mnt and /gcs.
    """
    found = re.search(r"--workdir[= ](\S+)", command)
    path = found[1].strip("'\"") if found else ""
    return "" if path.startswith(("/mnt/", "/gcs/")) else path


def judge(reports: Sequence[str], workers: int) -> str:
    """What the reports of all workers say together: running | done | stopped | failed | lost | unreachable.

    gcloud leaves out a slice that does not answer, so fewer reports than `workers` are no answer. lost: a run that
    ended without its own doing (143: the machine was told to shut down).
    """
    said = set(reports)
    if len(reports) < max(workers, 1):
        return "unreachable"
    for verdict in ("running", "stopped"):
        if verdict in said:
            return verdict
    if said & {"lost", "none", "143"}:
        return "lost"
    return "done" if said == {"0"} else "failed"
