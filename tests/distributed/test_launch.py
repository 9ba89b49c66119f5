"""launch/local.sh starts processes that find each other, from any directory, and hands their exit status on.

The package that it starts is a stand-in of a few lines: what is tested is the launcher, not training.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool import free_port

pytestmark = pytest.mark.distributed

LAUNCH = Path(__file__).parents[2] / "launch"

STAND_IN = """
import os, sys, time
rank = int(os.environ.get("RANK", "0"))
if sys.argv[1] == "meet":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    if rank == 0:
        print("sum", int(total), "arguments", *sys.argv[2:], "threads", os.environ["OMP_NUM_THREADS"])
elif sys.argv[1] == "recover":
    print("start", os.environ["TORCHELASTIC_RESTART_COUNT"], "of", os.environ["TORCHELASTIC_MAX_RESTARTS"], flush=True)
    sys.exit(int(sys.argv[2]) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
elif sys.argv[1] == "stop":
    import signal
    from pathlib import Path
    def save(number, frame):
        if rank == 1:
            time.sleep(3)
        patience = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        Path(sys.argv[2], f"saved-{rank}").write_text(f"{signal.Signals(number).name} {patience}")
        sys.exit(75)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    Path(sys.argv[2], f"ready-{rank}").touch()
    time.sleep(60)
elif sys.argv[1] == "preempted":
    if rank == 1:
        time.sleep(3)
        print("saved", flush=True)
    sys.exit(75)
elif sys.argv[1] == "fail":
    if rank == 1:
        sys.exit(int(sys.argv[2]))
    time.sleep(600)
else:
    print("rank" in os.environ, sys.argv[1:])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(LAUNCH, tmp_path / "checkout" / "launch")
    package = tmp_path / "checkout" / "swinmoe"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(STAND_IN)
    return tmp_path / "checkout"


def launch(checkout: Path, *arguments: str, script: str = "local.sh", **extra: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    return subprocess.run(
        [str(checkout / "launch" / script), *arguments],
        cwd=checkout.parent,
        env={**keep, "PYTHON": sys.executable, **extra},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_several_processes_meet(checkout: Path) -> None:
    done = launch(checkout, "--processes", "3", "meet", "c.yaml", "a.b=1", "--flag", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sum 6 arguments c.yaml a.b=1 --flag threads 2\n"


def test_the_failing_process_ends_the_job_with_its_status(checkout: Path) -> None:
    assert launch(checkout, "--processes=2", "--cpu", "fail", "7").returncode == 7


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_failure_is_followed_by_another_start(checkout: Path, processes: str) -> None:
    done = launch(checkout, "--processes", processes, "--cpu", "--max-restarts", "2", "recover", "3")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["start 0 of 2"] * int(processes) + ["start 1 of 2"] * int(processes)
    assert done.stderr == "launch/local.sh: failed with exit status 3; starting again (restart 1 of 2)\n"


def test_what_the_user_must_mend_is_not_tried_again(checkout: Path) -> None:
    done = launch(checkout, "--processes", "1", "--max-restarts", "2", "recover", "2")
    assert (done.returncode, done.stdout) == (2, "start 0 of 2\n")


def test_a_save_is_not_cut_off_and_not_started_again(checkout: Path) -> None:
    """The first rank to end has saved; another may still be writing."""
    done = launch(checkout, "--processes", "2", "--max-restarts", "2", "preempted")
    assert (done.returncode, done.stdout, done.stderr) == (75, "saved\n", "")
    wrong = launch(checkout, "--processes", "2", "preempted", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="soon")
    assert wrong.returncode == 2 and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=soon is not a number of seconds" in wrong.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("script", ["local.sh", "torchrun.sh"])
def test_told_to_stop_all_ranks_save(checkout: Path, script: str, number: signal.Signals) -> None:
    options = {
        "local.sh": ["--processes", "2"],
        "torchrun.sh": ["--nodes", "1", "--head", "127.0.0.1:0", "--per-node", "2"],
    }
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    job = subprocess.Popen(
        [str(checkout / "launch" / script), *options[script], "stop", str(checkout)],
        cwd=checkout.parent,
        env={**keep, "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 100
        while len(list(checkout.glob("ready-*"))) < 2 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(number)
        status = job.wait(timeout=60)
    finally:
        job.kill()
        job.wait()
    said = [(checkout / f"saved-{rank}").read_text().split() for rank in range(2)]
    assert [name for name, _ in said] == [number.name] * 2
    if script == "local.sh":
        assert status == 75
    else:
        assert status != 0 and [patience for _, patience in said] == ["120"] * 2


def test_slurm_hands_on_its_machines_and_the_command(checkout: Path, tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: no cluster is here. Its names are more than a pipe holds, so that a reader
    which leaves after the first breaks it every time."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"scontrol": "echo node7; seq -f node%g 8 20000", "srun": 'printf "%s\\n" "$@"'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    (checkout / "launch" / "slurm.sbatch").chmod(0o755)  # sbatch reads it; here it runs
    directives = (checkout / "launch" / "slurm.sbatch").read_text()
    # Slurm makes no folders: a log in one that is not there loses everything that is said.
    assert "--output=slurm-%j.log\n" in directives
    job = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    more = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(checkout)}
    arguments = ("--max-restarts", "3", "train", "c.yaml", "resume=auto")
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = launch(checkout, *arguments, script="slurm.sbatch", **job, **more, **path)
    assert (done.returncode, done.stderr) == (0, "")
    given = done.stdout.split()
    assert given[2:4] == [str(checkout / "launch" / "torchrun.sh"), "--nodes"]
    assert " ".join(given[4:]) == (
        "2 --head node7:20041 --per-node 8 --max-restarts 3 --job 41 -- train c.yaml resume=auto"
    )
    forgetful = launch(checkout, "train", "c.yaml", script="slurm.sbatch", **job, **more, **path)
    assert "no resume=auto among the arguments" in forgetful.stderr


@pytest.mark.parametrize(
    ("file", "processes", "machines"),
    [("cpu.yaml", 1, 1), ("gpu_1.yaml", 1, 1), ("gpu_8.yaml", 8, 1), ("multi_node.yaml", 16, 2)],
)
def test_accelerate_reads_its_files(file: str, processes: int, machines: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(LAUNCH / "accelerate" / file))
    assert (read.num_processes, read.num_machines, read.use_cpu) == (processes, machines, file == "cpu.yaml")
    assert read.mixed_precision == "no"


def test_one_process_needs_no_launcher(checkout: Path) -> None:
    done = launch(checkout, "--processes", "1", "anything", "x")
    assert (done.returncode, done.stdout) == (0, "False ['anything', 'x']\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given"),
        (["--processes", "none", "train"], "--processes none is not a positive number"),
        (["--procs", "2", "train"], "unknown option --procs"),
        (["--max-restarts", "often", "train"], "--max-restarts often is not a number"),
    ],
)
def test_wrong_arguments_are_explained(checkout: Path, arguments: list[str], message: str) -> None:
    done = launch(checkout, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_two_agents_meet_as_two_machines(checkout: Path) -> None:
    head = f"127.0.0.1:{free_port()}"
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [
        str(checkout / "launch" / "torchrun.sh"),
        "--nodes",
        "2",
        "--head",
        head,
        "--per-node",
        "1",
        "meet",
        "c.yaml",
    ]
    agents = [
        subprocess.Popen(
            command,
            cwd=checkout.parent,
            env={**keep, "PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["", "sum 3 arguments c.yaml threads 1\n"]
