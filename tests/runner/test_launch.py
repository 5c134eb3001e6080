"""A sweep in several processes, and the examples of the page about it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("submitit")
yaml = pytest.importorskip("yaml")

from submitit.slurm.slurm import SlurmExecutor  # noqa: E402

from dynamics import config as configs  # noqa: E402
from dynamics import record  # noqa: E402
from experiments import early_learning_theory as theory  # noqa: E402
from runner import command as cli  # noqa: E402
from runner import launch, progress, worker  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launching.md").read_text()
NAME = "early_learning_theory"
PRESET = f"configs/{NAME}/default.py"
STUDY = theory.Distillation(replicas=2, validated=4, examples=4)
POINTS = configs.grid(theory.Config(study=STUDY), {"seed": range(12)})
SMALL = [
    *("sweep", NAME, PRESET, "--study", "distillation", "--study.replicas", "2"),
    *("--study.validated", "4", "--study.examples", "4", "--seed"),
]
SWEEP = [*SMALL, *map(str, range(12))]


@pytest.fixture(autouse=True)
def here(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("DYNAMICS_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])


# ---- a worker is killed -------------------------------------------------------------------------


def kill_who_takes(unit: launch.Unit, home: Path, over: threading.Event, killed: list[int]) -> None:
    """SIGKILL every worker that begins the unit, until the launch is over."""
    while not over.wait(0.005):
        for folder in home.glob("launches/*"):
            beside = worker.job_of(folder, unit)  # submitit's process beside the worker
            if beside and not record.finished(home, unit):
                children = Path(f"/proc/{beside}/task/{beside}/children")
                for pid in map(int, children.read_text().split() if children.exists() else ()):
                    if pid not in killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)


def began(home: Path) -> list[set[str]]:
    """Of each launch the units that were begun."""
    return [{p.stem for p in f.glob("*.taken")} for f in sorted(home.glob("launches/*"))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a worker through /proc")
def test_a_killed_worker_takes_no_other_with_it(tmp_path: Path, capsys: Any) -> None:
    home, command = tmp_path / NAME, [*SWEEP, "--runs", str(tmp_path), "--workers", "3"]
    cut = launch.units(POINTS, 3)
    victim, over, killed = cut[0], threading.Event(), []
    killer = threading.Thread(target=kill_who_takes, args=(victim, home, over, killed))
    killer.start()
    try:
        assert cli.main(command) == 1
    finally:
        over.set()
        killer.join()
    said = capsys.readouterr().err
    assert len(killed) == 1 + launch.AGAIN
    assert f"{len(victim)} of 12 runs of {NAME} are missing" in said
    assert "its worker died again" in said and "_log.err" in said
    assert "the same command computes what is missing" in said
    others = [point for unit in cut[1:] for point in unit]
    assert record.finished(home, others) and not any(record.finished(home, (p,)) for p in victim)

    stamps = {path: path.stat() for path in home.glob("*/done.json")}
    assert len(stamps) == len(others)
    assert cli.main(command) == 0
    assert f"12 runs of {NAME}" in capsys.readouterr().out
    assert all(path.stat() == stamp for path, stamp in stamps.items())
    assert began(home)[1:] == [{configs.fingerprint(victim)}]
    assert len(list(sorted(home.glob("launches/*"))[1].glob("*_submitted.pkl"))) == 1

    assert cli.main(command) == 0 and len(began(home)) == 2  # nothing is left to launch
    for point, findings in zip(POINTS, theory.sweep(POINTS, None), strict=True):
        found = record.read(home / configs.fingerprint(point))
        for name, frame in findings.frames.items():
            assert found.frames[name].equals(frame)
        for name, array in findings.arrays.items():
            np.testing.assert_array_equal(found.arrays[name].values, array.values)


def test_an_error_in_a_unit_is_told_with_its_log(tmp_path: Path, capsys: Any) -> None:
    one = [*SMALL, "0"]
    wrong = ["--workers", "3", "--mesh", "7", "1", "1"]
    assert cli.main([*one, "--runs", str(tmp_path), *wrong]) == 1
    said = capsys.readouterr().err
    assert f"1 of 1 runs of {NAME} are missing" in said
    assert "ValueError: mesh {'replica': 7, 'data': 1, 'model': 1} needs 7 devices" in said
    log = Path(said.split("log: ")[1].split()[0])
    assert "Traceback" in log.read_text()
    assert "died" not in said and len(list(log.parent.glob("*_submitted.pkl"))) == 1


def test_workers_end_with_the_command(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    home = tmp_path / NAME

    @contextmanager
    def line() -> Iterator[Any]:
        yield interrupted

    def interrupted(text: str) -> None:
        if any(began(home)):  # Ctrl-C, or SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    monkeypatch.setattr(progress, "line", line)
    monkeypatch.setattr(launch, "GRACE", 0.1)  # what trains would save a checkpoint meanwhile
    assert cli.main([*SWEEP, "--runs", str(tmp_path), "--workers", "2"]) == 143
    assert "stopped; the same command goes on" in capsys.readouterr().err
    jobs = {os.readlink(taken) for taken in home.glob("launches/*/*.taken")}
    assert jobs and not [job for job in jobs if Path(f"/proc/{job}").exists()]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_processes_do_not_compute_one_point(tmp_path: Path) -> None:
    """One that holds it says so; the lock is free when its process is gone."""
    holder = (
        "import sys, time, unittest.mock as m; from pathlib import Path\n"
        "import jax; jax.process_index = lambda: 0\n"
        "from dynamics import record; from experiments.early_learning_theory import Config\n"
        "with record.alone(Path(sys.argv[1]), (Config(seed=1), Config(seed=2)), wait=False) as a:\n"
        "    print(a, flush=True); time.sleep(60)\n"
    )
    held = [theory.Config(seed=seed) for seed in range(4)]
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        for points, free in ((held[:1], True), (held[2:], False), (held[3:], True)):
            with record.alone(tmp_path, points, wait=False) as mine:
                assert mine == free
        process.kill()
        with record.alone(tmp_path, held, wait=True) as mine:
            assert mine
    (tmp_path / configs.fingerprint(held[0])).mkdir()
    (tmp_path / configs.fingerprint(held[0]) / "done.json").touch()
    tmp_path.chmod(0o555)
    with record.alone(tmp_path, held[:1], wait=False) as mine:
        assert mine  # finished: nothing will be written


@pytest.mark.parametrize(
    ("workers", "sizes"),
    [(0, [4, 4, 4]), (2, [4, 4, 4]), (4, [2] * 6), (6, [2] * 6), (12, [1] * 12)],
)
def test_units_are_equal_parts_of_programs(workers: int, sizes: list[int]) -> None:
    grid = {"study.steps": (2, 3, 4), "seed": (0, 1, 2, 3)}
    points = configs.grid(theory.Config(study=STUDY), grid)
    found = launch.units(points, workers)
    assert [len(unit) for unit in found] == sizes
    assert set(sum(found, ())) == set(points) and len(sum(found, ())) == len(points)
    assert all(len(configs.group(unit)) == 1 for unit in found)


def test_one_program_is_cut_for_its_workers() -> None:
    assert [len(unit) for unit in launch.units(POINTS, 5)] == [2, 2, 3, 2, 3]


def test_workers_share_the_machine(monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    assert [cores for cores, _ in launch._shares(2)] == [[0, 2, 4], [1, 3]]
    assert [cores for cores, _ in launch._shares(7)] == [[0], [1], [2], [3], [4], [0], [1]]
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in launch._shares(7)} == {""}
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a,5")
    found = [env["CUDA_VISIBLE_DEVICES"] for _, env in launch._shares(2)]
    assert found == ["3,5", "GPU-a"]
    with pytest.raises(ValueError, match="at most the 3 GPUs of this machine, got 4"):
        launch._shares(4)


# ---- what can't be meant ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers"], "--workers must be one number of processes, at least 1, got nothing"),
        (["--workers", "0"], "at least 1, got 0"),
        (["--workers", "2", "3"], "at least 1, got 2 3"),
        (["--workers", "many"], "at least 1, got many"),
        (["--slurm"], "--slurm needs timeout_min=MINUTES"),
        (["--slurm", "partition=gpu"], "--slurm needs timeout_min=MINUTES"),
        (["--slurm", "gpu"], "--slurm takes NAME=VALUE, as in partition=gpu nodes=2, got 'gpu'"),
        (["--slurm", "timeout_min=9"], 'Could not detect "srun"'),
    ],
)
def test_refusals(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    assert cli.main([*SWEEP, "--runs", str(tmp_path / "runs"), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_without_submitit_the_extra_is_named(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main([*SWEEP, "--runs", str(tmp_path), "--workers", "2"]) == 2
    assert "need submitit: pip install -e '.[cluster]'" in capsys.readouterr().err


# ---- SLURM, played by three scripts -------------------------------------------------------------

SLURM = {
    "sbatch": """\
        cp "$1" "$0.sh"
        export SLURM_JOB_ID=77 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0
        export SLURM_PROCID=0 SLURM_LOCALID=0
        bash "$1" > /dev/null 2>&1 < /dev/null &
        echo Submitted batch job 77""",
    "srun": """\
        while [[ $1 == -* ]]; do
            [[ $1 == --error ]] && log=${2//%j/77}
            case $1 in --output|--error) shift 2;; *) shift;; esac
        done
        exec "$@" 2> "${log//%t/0}" > /dev/null""",
    "sacct": """\
        printf 'JobID|State|NodeList\\n77|RUNNING|n1\\n'""",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: Any) -> Path:
    for name, text in SLURM.items():
        script = tmp_path / name
        script.write_text(f"#!/bin/bash\n{text}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_slurm_has_a_job_for_each_program(slurm: Path, capsys: Any) -> None:
    home, flags = slurm / "runs" / NAME, ("partition=gpu", "gpus_per_node=4", "timeout_min=7")
    command = [*SMALL, "0", "1", "--runs", str(slurm / "runs"), "--slurm", *flags]
    assert cli.main([*command, "partitoin=cpu"]) == 2
    assert "Unknown argument 'partitoin'" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert f"2 runs of {NAME}" in capsys.readouterr().out
    script = (slurm / "sbatch.sh").read_text()
    for line in ("partition=gpu", "gpus-per-node=4", "time=7", "ntasks-per-node=1", "nodes=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1" in script and f"--job-name={NAME}" in script

    (mark,) = home.glob("launches/*/*.job")
    assert mark.read_text() == "77"
    for path in [*home.glob("*/done.json"), *home.glob("launches/*/*_result.pkl")]:
        path.unlink()  # as if the job were still at it
    assert cli.main(command) == 1
    assert "job 77 of an earlier command is queued or running" in capsys.readouterr().err
    assert len(list(home.glob("launches/*"))) == 1


def test_a_job_whose_time_is_up_is_queued_again_as_it_was() -> None:
    again = worker.work.checkpoint("name", [POINTS[:1]])  # what submitit asks for
    assert again.function is worker.work and again.args == ("name", [POINTS[:1]])


def test_a_process_for_a_node_has_all_its_gpus() -> None:
    """Where jax would give it one, because SLURM numbers it among those of the node."""
    nodes = {"nodes": 2, "gpus_per_node": 4}
    assert launch._of_a_node(nodes)[1] == {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    assert launch._of_a_node(nodes | {"tasks_per_node": 4})[1] == {}
    assert launch._of_a_node({"gpus_per_node": 4})[1] == {}


# ---- the examples of the page -------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def commands(words: list[str]) -> Iterator[list[str]]:
    """The arguments of each ``python -m experiments``, also of one that is quoted in another."""
    for i, word in enumerate(words):
        if "python -m experiments" in word:
            yield from commands(shlex.split(word))
        elif words[i : i + 3] == ["python", "-m", "experiments"]:
            yield [word for word in words[i + 3 :] if word != "&"]


def in_yaml() -> Iterator[list[str]]:
    for document in [d for block in blocks("yaml") for d in yaml.safe_load_all(block)]:
        if document["kind"] == "Job":
            for container in document["spec"]["template"]["spec"]["containers"]:
                yield from commands(container["command"] + container["args"])


ALL = [
    *(
        c
        for b in blocks("sh")
        for line in b.splitlines()
        for c in commands(shlex.split(line, True))
    ),
    *in_yaml(),
]


def test_the_page_has_examples() -> None:
    assert len(ALL) == 8
    assert sum("--slurm" in command for command in ALL) == 2
    for words in ("--worker=all --command", "#SBATCH --nodes=2", "completionMode: Indexed"):
        assert words in PAGE


@pytest.mark.parametrize("command", ALL, ids=lambda command: " ".join(command)[:60])
def test_the_commands_of_the_page_are_read(command: list[str], monkeypatch: Any) -> None:
    """By the command line itself, all but carried out; parameters of SLURM by submitit."""
    found: list[Any] = []
    monkeypatch.setattr(cli, "_launch", lambda *given: found.append(given[-1]) or 0)
    monkeypatch.setattr(cli, "_run", lambda *given: found.append(given) or 0)
    assert cli.main(command) == 0 and len(found) == 1
    if "--slurm" in command:
        names = {*SlurmExecutor._equivalence_dict(), *SlurmExecutor._valid_parameters()}
        assert set(found[0].slurm) <= names


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block[:40])
def test_the_shell_of_the_page_is_shell(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr
    options = re.findall(r"^#SBATCH --([\w-]+)=", block, re.M)
    known = SlurmExecutor._valid_parameters()
    assert {option.replace("-", "_") for option in options} <= known


def test_the_pods_find_each_other() -> None:
    documents = [d for block in blocks("yaml") for d in yaml.safe_load_all(block)]
    service, job = documents
    pod, count = job["spec"]["template"]["spec"], job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == count
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}:"
    assert values["JAX_COORDINATOR_ADDRESS"].startswith(first)
    assert values["JAX_NUM_PROCESSES"] == str(count) and "JAX_PROCESS_ID" in values
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    chips = np.prod([int(word) for word in container["args"][1:4]])
    assert chips == count * container["resources"]["limits"]["nvidia.com/gpu"]
