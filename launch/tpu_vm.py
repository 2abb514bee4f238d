"""TPU slices of Google Cloud: python -m launch.tpu_vm create|copy|run|logs|stop|status|delete --name=mine [...]

  create --name=mine --type=v5litepod-16 --spot --wait     a queued resource; --slices=2 for several slices
  copy   --name=mine                                       tracked files and Python packages, to every worker
  run    --name=mine --command="python -m launch.train ..." the same line on every worker; it outlives the connection
  run    ... --type=v5litepod-16 --spot --restart=10       stays here and starts again what a preemption ended
  logs, stop, status, delete                               stop: the run saves and ends; delete: no more to pay

All of it is `gcloud`, which must be installed and logged in; --dry_run prints its command lines and runs none. Slices
of several workers need the key in the agent: ssh-add ~/.ssh/google_compute_engine. On a worker: ~/kdjax, its
environment in .venv, state and log in runs/tpu_vm. A preemption deletes a worker's disk: mount a bucket on all of them
(copy --setup="...") and keep --workdir there, say at /mnt/bucket/run.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import app
from launch.tpu_commands import (
    FIRST,
    REPORT,
    Tpu,
    archive,
    checked,
    create_line,
    delete_line,
    describe_line,
    install_script,
    judge,
    local_workdir,
    logs_script,
    pack_line,
    report_script,
    send_line,
    ssh_line,
    start_script,
    stop_script,
)

ACTIONS = ("create", "copy", "run", "logs", "stop", "status", "delete")
flags.DEFINE_enum("action", None, ACTIONS, "What to do; the first word of the command line.")
flags.DEFINE_string("name", None, "Of the queued resource and its slices.")
flags.DEFINE_string("type", "", "TPU type: v5litepod-16, v6e-8, v5p-64, v4-32. create, run --restart.")
flags.DEFINE_string("zone", "", "Where; default: gcloud's own setting.")
flags.DEFINE_string("project", "", "Who pays; default: gcloud's own setting.")
flags.DEFINE_integer("slices", 1, "Slices of that type, which JAX joins into one run.")
flags.DEFINE_bool("spot", False, "Cheap capacity that may be taken away.")
flags.DEFINE_bool("reserved", False, "Capacity of a reservation.")
flags.DEFINE_string("runtime", "", "TPU software version; default: by --type.")
flags.DEFINE_string("create_flags", "", "More flags of `queued-resources create`: --network=... --service-account=...")
flags.DEFINE_string("ssh_flags", "", "More flags of ssh and scp: --tunnel-through-iap, --internal-ip, ...")
flags.DEFINE_bool("wait", False, "create: return when the slice is there.")
flags.DEFINE_string("python", "3.11", "copy: Python of the environment; with requirements.txt it decides the JAX.")
flags.DEFINE_string("setup", "", "copy: a shell line for every worker after the install, say to mount a bucket.")
flags.DEFINE_string("command", None, "run: the line, in ~/kdjax with the environment active.")
flags.DEFINE_integer("restart", 0, "run: stay, and after a preemption do create, copy and run again, so many times.")
flags.DEFINE_bool("delete_when_done", False, "run --restart: delete the slice when the line has ended well.")
flags.DEFINE_float("poll", 60.0, "Seconds between two looks at the slice.")
flags.DEFINE_integer("lines", 100, "logs: how many of worker 0.")
flags.DEFINE_bool("follow", False, "logs: go on until Ctrl-C.")
flags.DEFINE_bool("dry_run", False, "Print the command lines, run none.")

ROOT = Path(__file__).resolve().parents[1]
TAKEN = ("SUSPENDED", "FAILED")  # states of a queued resource without machines
GONE = (*TAKEN, "lost", "unreachable")
# How often in a row something must be seen before it counts: machines that are taken away look broken first.
PATIENCE = {"failed": 2, "lost": 5, "unreachable": 5, "UNKNOWN": 10}
TRIES = 10  # at deleting what is gone
LONGEST = 600.0  # seconds until a worker that does not answer is given up for this look


def main() -> int:
    """Flags -> command lines -> printed, or run one after the other."""
    f = flags.FLAGS
    action, watched = app.require("action"), f.action == "run" and f.restart > 0
    words = [tuple(shlex.split(f[name].value)) for name in ("create_flags", "ssh_flags")]
    tpu = Tpu(app.require("name"), f.type, f.zone, f.project, f.slices, f.spot, f.reserved, f.runtime, *words)
    checked(tpu, rents=action == "create" or watched)
    lines = lines_of(action, tpu)
    if action == "run" and (path := local_workdir(f.command)) and (watched or f.spot or f.slices > 1):
        _warn(f"--workdir={path} is on a worker's own disk, which a preemption deletes; mount a bucket at /mnt/...")
    if f.dry_run:
        print(*map(shlex.join, lines), sep="\n")
        if watched:
            print(f"# after a preemption, at most {f.restart} times; copy and run when the state is ACTIVE:")
            again = [delete_line(tpu), create_line(tpu), describe_line(tpu), *lines_of("copy", tpu)[1:], *lines]
            print(*map(shlex.join, again), sep="\n")
        return 0
    if shutil.which("gcloud") is None:
        raise OSError("gcloud must be on the PATH, got none. Install the Google Cloud CLI, or see --dry_run.")
    try:
        return _watched(tpu, lines) if watched else _performed(action, tpu, lines)
    except KeyboardInterrupt:
        print("no longer watched; what runs on the TPU goes on, and the same command watches it again")
        return 130


def lines_of(action: str, tpu: Tpu) -> list[list[str]]:
    """The command lines of an action."""
    f = flags.FLAGS
    if action == "create":
        return [create_line(tpu), describe_line(tpu)] if f.wait else [create_line(tpu)]
    if action == "copy":
        return [pack_line(tpu), send_line(tpu), ssh_line(tpu, install_script(f.python, f.setup))]
    if action == "run":
        return [ssh_line(tpu, start_script(app.require("command")))]
    if action == "logs":
        return [ssh_line(tpu, logs_script(f.lines, f.follow), FIRST)]
    if action == "stop":
        return [ssh_line(tpu, stop_script())]
    if action == "status":
        return [describe_line(tpu), ssh_line(tpu, report_script())]
    return [delete_line(tpu)]


def _performed(action: str, tpu: Tpu, lines: list[list[str]]) -> int:
    if action == "copy":
        _tell_untracked()
    if action == "status" and (found := state_of(tpu))[0] != "ACTIVE":
        print(*found)
        return 0
    for line in lines:
        if action == "create" and line == describe_line(tpu):
            wait(tpu, flags.FLAGS.poll)
        else:
            perform(line)
    return 0


def perform(line: list[str]) -> None:
    """Run it, its output as it comes. Raises OSError if it fails."""
    code = subprocess.run(line, cwd=ROOT, check=False).returncode
    if code:
        raise OSError(f"{shlex.join(line[:6])} ... must end with 0, got {code}; what it says is above.")


def attempt(lines: Sequence[list[str]]) -> bool:
    """Run them until one fails; whether none did."""
    return all(subprocess.run(line, cwd=ROOT, check=False).returncode == 0 for line in lines)


def state_of(tpu: Tpu) -> tuple[str, str]:
    """(state, what gcloud complained): a state of queued resources, NONE if there is none of this name, UNKNOWN."""
    done = subprocess.run(describe_line(tpu), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip() or "UNKNOWN", ""
    return "NONE" if "NOT_FOUND" in done.stderr else "UNKNOWN", done.stderr.strip()


def reports_of(tpu: Tpu) -> list[str]:
    """What the run does on each worker that answers; why none does goes to the screen."""
    line = ssh_line(tpu, report_script())
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return []
    found = [said for _, said in REPORT.findall(done.stdout)]
    if not found:
        print(*done.stderr.splitlines()[-1:], file=sys.stderr)
    return found


def wait(tpu: Tpu, poll: float) -> None:
    """Until the slice is ACTIVE. Raises OSError if it will never be, or gcloud does not answer."""
    before, seen = "", 0
    while before != "ACTIVE":
        state, complaint = state_of(tpu)
        seen = seen + 1 if state == before else 1
        before = _tell(tpu, state, before)
        if state in (*TAKEN, "NONE"):
            raise OSError(f"{tpu.name} must become ACTIVE, got {state}. Delete it and create it again. {complaint}")
        if state == "UNKNOWN" and seen == PATIENCE["UNKNOWN"]:
            raise OSError(f"gcloud must say the state of {tpu.name}, got no answer {seen} times; {complaint}")
        time.sleep(0 if state == "ACTIVE" else poll)


def _watched(tpu: Tpu, lines: list[list[str]]) -> int:
    f = flags.FLAGS
    ended = supervise(tpu, lines_of("copy", tpu), lines, f.restart, f.poll)
    attempt([ssh_line(tpu, logs_script(20, False), FIRST)])
    if ended == "done" and f.delete_when_done:
        perform(delete_line(tpu))
    else:
        print(f"{ended}; {tpu.name} is paid for until: python -m launch.tpu_vm delete --name={tpu.name}")
    return 1 if ended == "failed" else 0


def supervise(tpu: Tpu, copy: list[list[str]], run: list[list[str]], restarts: int, poll: float) -> str:
    """Keep the run going until it is done | stopped | failed by its own doing, which is returned.

    A run that goes on already is watched and not started twice. Machines that are gone are deleted and rented anew,
    and get the archive of the first `copy`. Raises OSError when that is needed more than `restarts` times, when
    somebody deleted the machines, or when gcloud does not answer.
    """
    state, complaint = state_of(tpu)
    if state == "UNKNOWN":
        raise OSError(f"gcloud must say the state of {tpu.name}, got no answer; {complaint}")
    afresh = [ssh_line(tpu, stop_script()), *copy[1:], *run]  # stop: what an attempt that broke off has started
    todo = [] if state == "ACTIVE" else afresh
    if state == "NONE" or not (ROOT / archive(tpu)).is_file():
        perform(copy[0])
    if state == "NONE":
        perform(create_line(tpu))
    elif state == "ACTIVE" and "running" not in reports_of(tpu):
        perform(run[0])
    before, seen, workers, left = "", 0, 0, restarts
    while True:
        time.sleep(poll)
        verdict, complaint = state_of(tpu)
        if verdict == "ACTIVE":
            if todo and set(reports_of(tpu)) != {"running"} and not attempt(todo):
                verdict = "unreachable"
            else:
                todo, reports = [], reports_of(tpu)
                workers = max(workers, len(reports))
                verdict = judge(reports, workers)
        seen = seen + 1 if verdict == before else 1
        before = _tell(tpu, verdict, before)
        if seen < PATIENCE.get(verdict, 1):
            continue
        if verdict in ("done", "stopped", "failed"):
            return verdict
        if verdict == "UNKNOWN":
            raise OSError(f"gcloud must say the state of {tpu.name}, got no answer {seen} times; {complaint}")
        if verdict == "NONE" and not todo:
            raise OSError(f"{tpu.name} must be there, got none; somebody deleted it. Run the same command to go on.")
        if verdict in ("NONE", *GONE) and left == 0:
            raise OSError(f"--restart must be above {restarts} to go on, got {restarts}; the slice is {verdict} again.")
        if verdict == "NONE":
            left -= 1
            attempt([create_line(tpu)])
        elif verdict in GONE:
            todo, workers = afresh, 0
            if not attempt([delete_line(tpu)]) and seen >= TRIES:
                raise OSError(f"{tpu.name} must be deleted to go on, got {seen} refusals; what gcloud says is above.")


def _tell(tpu: Tpu, state: str, before: str) -> str:
    if state != before:
        print(f"{time.strftime('%H:%M:%S')} {tpu.name}: {state}", flush=True)
    return state


def _tell_untracked() -> None:
    line = ["git", "ls-files", "--others", "--exclude-standard"]
    names = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]
    if names:
        _warn(f"{len(names)} files that git does not track are not sent: {', '.join(names[:3])} ...")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--action={sys.argv[1]}"
    app.run(main)
