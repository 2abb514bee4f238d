"""launch.tpu_vm against a `gcloud` that has workers: folders in which it really runs what ssh is told to run.

It plays the states of a queued resource from a list; at SUSPENDED the machines die with all that is on their disks.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import tpu_commands
from launch.tpu_commands import Tpu
from tests.launch import launched

ROOT = pathlib.Path(__file__).parents[2]
FAKE = r"""
import json, os, pathlib, shutil, signal, subprocess, sys
world, (verb, name, *rest) = pathlib.Path(os.environ["FAKE_WORLD"]), sys.argv[4:]
with open(world / "calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
homes = sorted((world / "workers").glob("*"))
assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"], sys.argv
def wipe():
    for home in homes:
        try: os.killpg(int((home / "kdjax/runs/tpu_vm/pid").read_text()), signal.SIGKILL)
        except (OSError, ValueError): pass
        shutil.rmtree(home)
if verb == "describe":
    first, *states = (world / "states").read_text().split()
    (world / "states").write_text(" ".join(states or [first]))
    if first in ("SUSPENDED", "FAILED"): wipe()
    if first == "NONE": sys.exit("ERROR: (gcloud) NOT_FOUND: Requested entity was not found.")
    if first == "ERROR": sys.exit("ERROR: no network")
    print(first)
elif verb == "create":
    for worker in ("a", "b"): (world / "workers" / worker).mkdir(parents=True, exist_ok=True)
elif verb == "delete":
    wipe()
    (world / "states").write_text("NONE " + (world / "states").read_text())
elif verb == "scp":
    for home in homes: shutil.copy(name, home / rest[0].partition(":")[2])
else:
    (command,) = [word.removeprefix("--command=") for word in rest if word.startswith("--command=")]
    chosen = homes if "--worker=all" in rest else homes[:1]
    run = lambda home: subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)})
    codes = [run(home).returncode for home in chosen]
    sys.exit(max(codes, default=255))
"""
UV = """#!/bin/sh
echo "$@" >>"$HOME/uv"
case "$1" in venv) mkdir -p .venv/bin; cp /bin/true .venv/bin/python; : >.venv/bin/activate;; esac
"""


class World:
    """The folders of a test, and the script with its repository moved there."""

    def __init__(self, root, monkeypatch, capsys):
        self.root, self.capsys = root, capsys
        (root / "workers").mkdir()
        self.repository = root / "repository"
        self.repository.mkdir()
        programs = root / "bin"
        programs.mkdir()
        (root / "gcloud.py").write_text(FAKE)
        for name, text in {"gcloud": f'#!/bin/sh\nexec {sys.executable} -SE {root}/gcloud.py "$@"\n', "uv": UV}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_WORLD", str(root))
        self.states("ACTIVE")

    def states(self, *names):
        (self.root / "states").write_text(" ".join(names))

    def workers(self, *names):
        """Machines that are there from the start, installed on."""
        for name in names:
            (self.root / "workers" / name / "kdjax/.venv/bin").mkdir(parents=True)
            (self.root / "workers" / name / "kdjax/.venv/bin/activate").touch()
            (self.root / "workers" / name / "kdjax/.venv/bin/python").symlink_to("/bin/true")
        return [self.root / "workers" / name for name in names]

    def calls(self, verb=""):
        path = self.root / "calls"
        lines = [json.loads(line)[3:] for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line[0].startswith(verb)]

    def __call__(self, *arguments):
        """(what main returns, what was printed)"""
        try:
            with launched.loaded("tpu_vm", *arguments) as module:
                module.ROOT = self.repository
                code = module.main()
        finally:
            self.said = self.capsys.readouterr()
        return code, self.said.out

    def git(self, *arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
        subprocess.run(["git", *who, *arguments], cwd=self.repository, check=True, capture_output=True)

    def commit(self, files):
        self.git("init")
        for name, text in files.items():
            (self.repository / name).write_text(text)
        self.git("add", ".")
        self.git("commit", "-m", "m")


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    made = World(tmp_path, monkeypatch, capsys)
    yield made
    for pid in tmp_path.glob("workers/*/kdjax/runs/tpu_vm/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def until(condition, within=20):
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def remotely(home, script):
    """What the script prints on a worker; its exit code and errors too."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=home,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def report(home):
    ((_, said),) = tpu_commands.REPORT.findall(remotely(home, tpu_commands.report_script()).stdout)
    return said


# --- the text


def test_a_slice_of_one_type(world):
    code, out = world(
        "--action=create", "--name=mine", "--type=v5litepod-16", "--zone=us-west4-a", "--project=my-project", "--spot",
        "--create_flags=--network=n --labels='a=b c'", "--wait", "--dry_run",
    )  # fmt: skip
    queue = "gcloud compute tpus queued-resources"
    assert code == 0
    assert out.splitlines() == [
        f"{queue} create mine --node-id=mine --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--zone=us-west4-a --project=my-project --spot --network=n '--labels=a=b c'",
        f"{queue} describe mine --zone=us-west4-a --project=my-project '--format=value(state.state)'",
    ]


def test_several_slices_have_a_count_and_a_prefix():
    line = tpu_commands.create_line(Tpu("two", "v4-32", slices=2, reserved=True))
    assert line[4:] == [
        "create", "two", "--node-count=2", "--node-prefix=two", "--accelerator-type=v4-32",
        "--runtime-version=tpu-ubuntu2204-base", "--reserved",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v5p-64", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e"), ("v3-8", "tpu-ubuntu2204-base")],
)
def test_the_software_version_goes_by_the_type(kind, runtime):
    assert f"--runtime-version={runtime}" in tpu_commands.create_line(Tpu("a", kind))
    assert "--runtime-version=mine" in tpu_commands.create_line(Tpu("a", kind, runtime="mine"))


def test_a_dry_run_prints_what_a_shell_would_take_and_runs_nothing(world):
    line = "python -m launch.train --workdir=/mnt/b/x --config.name='a b' && echo \"it's\""
    words = ["--name=mine", "--type=v6e-8", f"--command={line}", "--ssh_flags=--tunnel-through-iap", "--dry_run"]
    printed = {
        action: [shlex.split(text, comments=True) for text in world(f"--action={action}", *words)[1].splitlines()]
        for action in ("create", "copy", "run", "logs", "stop", "status", "delete")
    }
    assert world.calls() == []
    assert {name: [(one[0], *one[5:6]) for one in lines] for name, lines in printed.items()} == {
        "create": [("gcloud", "mine")],
        "copy": [("sh",), ("gcloud", "runs/tpu_vm/mine.tar.gz"), ("gcloud", "mine")],
        "run": [("gcloud", "mine")],
        "logs": [("gcloud", "mine")],
        "stop": [("gcloud", "mine")],
        "status": [("gcloud", "mine"), ("gcloud", "mine")],
        "delete": [("gcloud", "mine")],
    }
    (run,) = printed["run"]
    assert {"--node=all", "--worker=all", "--tunnel-through-iap"} <= set(run)
    assert line in shlex.split(run[-1].removeprefix("--command="))  # whole, as one word
    assert {"--node=0", "--worker=0"} <= set(printed["logs"][0])


def test_a_dry_run_shows_the_restart_too(world):
    _, out = world("--action=run", "--name=m", "--type=v4-8", "--command=true", "--restart=3", "--dry_run")
    first, remark, *again = out.splitlines()
    assert remark.startswith("# after a preemption, at most 3 times")
    assert [shlex.split(line)[4] for line in again] == ["delete", "create", "describe", "scp", "ssh", "ssh"]
    assert again[-1] == first


def test_the_first_word_is_the_action():
    typed = [sys.executable, "-m", "launch.tpu_vm", "delete", "--name=mine", "--dry_run"]
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "gcloud compute tpus queued-resources delete mine --force --quiet\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--action=create"], "--name must be set"),
        (["--action=create", "--name=Mine"], "--name must be lower-case letters.*got 'Mine'"),
        (["--action=create", "--name=a"], "--type must be one of v2-N, .*, got ''"),
        (["--action=create", "--name=a", "--type=v5e-16"], "got 'v5e-16'. Write v5litepod-16."),
        (["--action=create", "--name=a", "--type=v4"], "--type must be one of v2-N"),
        (["--action=create", "--name=a", "--type=tpu7x-8"], "TPU7x is rented through Kubernetes"),
        (
            ["--action=status", "--name=a", "--zone=us-west4"],
            "--zone must be a zone such as us-west4-a, got",
        ),
        (["--action=status", "--name=a", "--project=P"], "--project must be a project id"),
        (["--action=status", "--name=a", "--slices=0"], "--slices must be at least 1, got 0"),
        (["--action=create", "--name=a", "--type=v4-8", "--spot", "--reserved"], "--spot must not be set with"),
        (["--action=run", "--name=a"], "--command must be set"),
        (["--action=run", "--name=a", "--command=c", "--restart=1"], "--type must be one of"),
        (["--name=a"], "--action must be set"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        world(*arguments)
    assert world.calls() == []


def test_without_gcloud_it_says_so(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="gcloud must be on the PATH, got none. Install the Google Cloud CLI"):
        world("--action=status", "--name=a")


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("train --workdir=runs/x --config=c", "runs/x"),
        ("train --workdir 'runs/x'", "runs/x"),
        ("train --workdir=/mnt/bucket/x", ""),
        ("train --workdir=gs://bucket/x", "gs://bucket/x"),  # a folder of that name would be made
        ("train", ""),
    ],
)
def test_a_workdir_that_a_preemption_deletes_is_seen(line, path):
    assert tpu_commands.local_workdir(line) == path


def test_and_said(world):
    words = ["--action=run", "--name=a", "--type=v4-8", "--command=train --workdir=runs/x", "--dry_run"]
    world(*words, "--restart=1")
    assert "--workdir=runs/x is on a worker's own disk" in world.said.err
    world(*words)
    assert world.said.err == ""


# --- on the workers


def test_a_run_outlives_the_connection_and_leaves_log_and_exit_code(world):
    a, b = world.workers("a", "b")
    line = 'echo "$JAX_PLATFORMS"; echo "it\'s here" && read -r go < ~/go; exit 7 # done'
    for home in (a, b):
        os.mkfifo(home / "go")
    assert report(a) == "none"
    assert world("--action=run", "--name=m", f"--command={line}")[0] == 0
    assert [report(a), report(b)] == ["running", "running"]
    with pytest.raises(OSError, match="must end with 0, got 1"):  # there is one already
        world("--action=run", "--name=m", "--command=true")
    for home in (a, b):
        (home / "go").write_text("now\n")
    until(lambda: [report(a), report(b)] == ["7", "7"])
    assert (b / "kdjax/runs/tpu_vm/log").read_text() == "tpu,cpu\nit's here\n"
    assert world.calls("ssh")[0][1:4] == ["m", "--node=all", "--worker=all"]


def test_stop_lets_it_save_and_leaves_out_what_would_follow(world):
    (a,) = world.workers("a")
    saver = "trap 'sleep 0.3; touch ~/saved; exit 0' TERM; touch ~/up; while :; do sleep 0.05; done"
    world("--action=run", "--name=m", f"--command=bash -c {shlex.quote(saver)} && touch ~/followed")
    until((a / "up").exists)
    done = remotely(a, tpu_commands.stop_script())
    assert done.stdout.split()[2] == "stopped"
    assert (a / "saved").exists()
    assert not (a / "followed").exists()
    assert (a / "kdjax/runs/tpu_vm/exit").read_text() == "143\n"
    assert remotely(a, tpu_commands.start_script("true")).returncode == 0  # and it can begin again
    until(lambda: report(a) == "0")


def test_a_killed_run_is_lost(world):
    (a,) = world.workers("a")
    remotely(a, tpu_commands.start_script("touch ~/up; sleep 60"))
    until((a / "up").exists)
    os.killpg(int((a / "kdjax/runs/tpu_vm/pid").read_text()), signal.SIGKILL)
    until(lambda: report(a) == "lost")


def test_nothing_runs_where_nothing_was_copied(world):
    home = world.root / "workers" / "a"
    home.mkdir()
    done = remotely(home, tpu_commands.start_script("true"))
    assert (done.returncode, done.stderr) == (1, "nothing is installed: copy first\n")


def test_copy_sends_tracked_files_as_they_are_now_and_installs(world):
    for name in ("a", "b"):
        (world.root / "workers" / name).mkdir()
    world.commit({"kept.py": "1", "gone.py": "2", ".gitignore": "runs/\n"})
    world("--action=copy", "--name=m", "--python=3.12", "--setup=touch ~/mounted")
    there = world.root / "workers" / "b" / "kdjax"
    assert sorted(p.name for p in there.iterdir()) == [".gitignore", ".venv", "gone.py", "kept.py"]
    assert (there.parent / "mounted").exists()
    assert (there.parent / "uv").read_text().splitlines() == [
        "venv --quiet --python=3.12 .venv",
        "pip install --quiet --python=.venv/bin/python -r requirements.txt jax[tpu]",
    ]
    (there / "runs").mkdir()
    (there / "runs" / "result").touch()
    (world.repository / "kept.py").write_text("changed")
    (world.repository / "new.py").write_text("3")
    world.git("rm", "gone.py")
    world("--action=copy", "--name=m")
    assert sorted(p.name for p in there.iterdir()) == [".gitignore", ".venv", "kept.py", "runs"]
    assert (there / "kept.py").read_text() == "changed"
    assert (there / "runs" / "result").exists()
    assert "1 files that git does not track are not sent: new.py" in world.said.err


def test_status_asks_the_workers_of_an_active_slice_only(world):
    world.workers("a")
    world.states("PROVISIONING")
    assert world("--action=status", "--name=m")[1].split() == ["PROVISIONING"]
    world.states("ACTIVE")
    world("--action=status", "--name=m")
    assert [call[0] for call in world.calls()] == ["describe", "describe", "describe", "ssh"]


def test_create_waits_until_it_is_there(world):
    world.states("WAITING_FOR_RESOURCES", "ERROR", "PROVISIONING", "ACTIVE")
    words = ["--action=create", "--name=m", "--type=v4-8", "--wait", "--poll=0"]
    out = world(*words)[1]
    assert [line.split()[-1] for line in out.splitlines()] == [
        "WAITING_FOR_RESOURCES", "UNKNOWN", "PROVISIONING", "ACTIVE",
    ]  # fmt: skip
    world.states("FAILED")
    with pytest.raises(OSError, match="m must become ACTIVE, got FAILED"):
        world(*words)
    world.states("ERROR")
    with pytest.raises(OSError, match="gcloud must say the state of m, got no answer 10 times; ERROR: no network"):
        world(*words)


# --- preemption

JOB = ["--action=run", "--name=m", "--type=v5litepod-16", "--spot", "--poll=0.05"]


def test_a_preempted_run_goes_on_where_it_was(world):
    """Two workers; the first life is taken after its first step, the second goes on from the bucket and ends."""
    world.commit({"code.py": "1"})
    bucket = world.root / "bucket"
    bucket.mkdir()
    line = f"f={bucket}/$(basename ~); echo step >>$f; test $(wc -l <$f) = 2 || sleep 60; cp code.py $f.code"
    world.states("NONE", "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDED", "PROVISIONING", "ACTIVE")
    code, out = world(*JOB, f"--command={line}", "--restart=1", "--delete_when_done")
    assert code == 0
    assert [(bucket / name).read_text() for name in ("a", "b", "b.code")] == ["step\nstep\n"] * 2 + ["1"]
    verbs = [call[0] for call in world.calls() if call[0] in ("create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete", "create", "scp", "delete"]
    creates = world.calls("create")
    assert creates[0] == creates[1]
    assert "--spot" in creates[0]
    starts = [call[-1] for call in world.calls("ssh") if "setsid" in call[-1]]
    assert starts == [starts[0]] * 2
    told = [line.split(": ")[1] for line in out.splitlines() if line[2:3] == ":"]
    assert told[:5] == ["PROVISIONING", "running", "SUSPENDED", "NONE", "PROVISIONING"]
    assert told[-1] == "done"


def test_the_code_of_a_restart_is_that_of_the_first_copy(world):
    world.commit({"code.py": "1"})
    world("--action=create", "--name=m", "--type=v4-8")
    world("--action=copy", "--name=m")
    (world.repository / "code.py").write_text("2")
    world.states("ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE")
    line = f"cp code.py {world.root}/code; test -e {world.root}/second || {{ touch {world.root}/second; sleep 60; }}"
    assert world(*JOB, f"--command={line}", "--restart=1")[0] == 0
    assert (world.root / "code").read_text() == "1"


def test_too_many_preemptions_end_it(world):
    world.workers("a")
    world.commit({"code.py": "1"})
    world.states("ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE", "SUSPENDED")
    with pytest.raises(OSError, match="--restart must be above 1 to go on, got 1; the slice is SUSPENDED again"):
        world(*JOB, "--command=sleep 60", "--restart=1")


def test_a_failing_line_is_not_run_again(world):
    world.workers("a", "b")
    world.commit({"code.py": "1"})
    code, out = world(*JOB, "--command=echo broken; false", "--restart=5")
    assert code == 1
    assert out.splitlines()[-1] == "failed; m is paid for until: python -m launch.tpu_vm delete --name=m"
    assert world.calls("create") == world.calls("delete") == []


def test_a_run_that_goes_on_is_watched_and_not_started_twice(world):
    (a,) = world.workers("a")
    world.commit({"code.py": "1"})
    looked = f"$(grep -cs kdjax-run {world.root}/calls)"  # it ends when it was seen to run
    remotely(a, tpu_commands.start_script(f'until test "{looked}" -ge 2; do sleep 0.05; done'))
    assert world(*JOB, "--command=touch ~/twice", "--restart=1")[0] == 0
    assert not (a / "twice").exists()


def test_a_user_who_stops_is_obeyed(world):
    (a,) = world.workers("a")
    world.commit({"code.py": "1"})
    stop = shlex.quote(tpu_commands.stop_script())
    code, out = world(*JOB, f"--command=(sleep 0.3; setsid bash -c {stop}) & sleep 60", "--restart=1")
    assert (code, out.splitlines()[-1].split(";")[0], report(a)) == (0, "stopped", "stopped")
    assert world.calls("delete") == []


def test_a_slice_that_somebody_deleted_is_not_rented_again(world):
    world.workers("a")
    world.commit({"code.py": "1"})
    world.states("ACTIVE", "ACTIVE", "NONE")
    with pytest.raises(OSError, match="m must be there, got none; somebody deleted it"):
        world(*JOB, "--command=sleep 60", "--restart=1")
    assert world.calls("create") == []


def test_machines_that_lose_the_run_are_replaced(world):
    world.workers("a", "b")
    world.commit({"code.py": "1"})
    line = f"sleep 0.2; mkdir {world.root}/first-$(basename ~) && kill -9 -- -$$; echo again"
    assert world(*JOB, f"--command={line}", "--restart=1")[0] == 0
    verbs = [call[0] for call in world.calls() if call[0] in ("create", "delete", "scp")]
    assert verbs == ["delete", "create", "scp"]


def test_a_gcloud_that_does_not_answer_deletes_nothing(world):
    world.workers("a")
    world.commit({"code.py": "1"})
    world.states("ACTIVE", "ERROR")
    with pytest.raises(OSError, match="gcloud must say the state of m, got no answer 10 times; ERROR: no network"):
        world(*JOB, "--command=sleep 60", "--restart=1")
    world.states("ERROR")
    with pytest.raises(OSError, match="gcloud must say the state of m, got no answer; ERROR: no network"):
        world(*JOB, "--command=sleep 60", "--restart=1")
    assert world.calls("delete") == []


@pytest.mark.parametrize(
    ("reports", "workers", "verdict"),
    [
        (["running", "running"], 2, "running"),
        (["0", "running"], 2, "running"),
        (["0", "0"], 2, "done"),
        (["0", "1"], 2, "failed"),
        (["1", "143"], 2, "lost"),  # one machine is shut down, the other's run fails for it
        (["0", "lost"], 2, "lost"),
        (["stopped", "143"], 2, "stopped"),
        (["0"], 2, "unreachable"),  # gcloud leaves out a slice that is gone, and ends with 0
        ([], 0, "unreachable"),
    ],
)
def test_what_the_workers_say_together(reports, workers, verdict):
    assert tpu_commands.judge(reports, workers) == verdict
