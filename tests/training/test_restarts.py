"""Processes that end, hang and come back, on one machine and, as torchrun sees it, on two."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.timing import free_port
from checkpoints.file import load_checkpoint
from tests.helpers import TINY_RUN, max_weight_difference, read_metrics
from tests.processes import ROOT, rank_environments, read_until, train_on_ranks

RUN = (*TINY_RUN, "--decay_lr=False", "--learning_rate=1e-3", "--init_from=auto")


@pytest.fixture
def options(data_dir):
    return [*RUN, f"--data_dir={data_dir}"]


started: list[subprocess.Popen] = []


def run(processes: int, *args, torchrun=("--standalone",), **how) -> subprocess.Popen:
    """train.py, under torchrun where there are several processes or agents."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    if processes > 1 or torchrun != ("--standalone",):
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started.append(subprocess.Popen(command, **streams, **how))
    return started[-1]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for process in started:
        process.kill()  # torchrun's own processes notice that it is gone
    started.clear()


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return list(map(int, file.read().split()))


linux_only = pytest.mark.skipif(
    not os.path.exists("/proc/self/task"), reason="finds children in /proc"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """A run of 40 steps on one process."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    options = (*RUN, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=40")
    train_on_ranks(1, *options)
    return out_dir


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(options, undisturbed, tmp_path):
    kinds = ((1, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "ddp"), (1, "fsdp"))
    for number, (processes, parallel) in enumerate(kinds):
        shape = (f"--max_iters={8 * number + 8}", f"--parallel={parallel}", "--sample_interval=8")
        if number == 1:  # as users start it, to its very end
            process = run(processes, *options, f"--out_dir={tmp_path}", *shape)
            assert process.communicate(timeout=180) and process.returncode == 0
        else:
            train_on_ranks(processes, *options, f"--out_dir={tmp_path}", *shape)
        is_sharded_checkpoint = parallel == "fsdp" and processes > 1
        newest, older = (
            ("ckpt.dcp", "ckpt.pt") if is_sharded_checkpoint else ("ckpt.pt", "ckpt.dcp")
        )
        assert (tmp_path / newest).exists() and not (tmp_path / older).exists()
        assert not list(tmp_path.glob("*.partial*")) and len(list(tmp_path.glob("ckpt_*"))) == 2
    assert max_weight_difference(undisturbed, tmp_path) < 1e-5
    assert read_metrics(tmp_path, "val_loss")[-1] == pytest.approx(
        read_metrics(undisturbed, "val_loss")[-1], abs=1e-5
    )


@linux_only
@pytest.mark.slow
def test_a_run_whose_process_is_killed_begins_again_by_itself(options, undisturbed, tmp_path):
    """The second start waited forever for the first one's addresses in torchrun's store."""
    restarting = ("--standalone", "--max-restarts=2")
    slowly = ("--max_iters=40", "--checkpoint_interval=1", "--eval_iters=40")
    process = run(2, *options, *slowly, f"--out_dir={tmp_path}", torchrun=restarting)
    read_until(process, "5 | loss ")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0 and "another one is gone" in said, said
    assert "init_from = 'resume'" in said and max_weight_difference(undisturbed, tmp_path) < 1e-5


def pair(*args, of_the_second=()) -> list[subprocess.Popen]:
    """Two processes of one run, as torchrun would start them."""
    first, second = (os.environ | place for place in rank_environments(2))
    return [run(1, *args, env=first), run(1, *args, *of_the_second, env=second)]


def test_processes_with_different_options_refuse_to_begin(options, tmp_path):
    both = pair(*options, f"--out_dir={tmp_path}", "--max_iters=3", of_the_second=["--max_iters=4"])
    for process in both:
        said = process.communicate(timeout=60)[0]
        assert (
            process.returncode == 1
            and "the processes have different options" in said
            and "Traceback" not in said
        )


def test_ranks_with_different_checkpoints_refuse_to_start(options, undisturbed, tmp_path):
    elsewhere = f"--out_dir={tmp_path / 'empty'}"
    for process in pair(
        *options, f"--out_dir={undisturbed}", "--max_iters=41", of_the_second=[elsewhere]
    ):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and "must be one folder that all machines see" in said, said
    assert load_checkpoint(str(undisturbed / "ckpt.pt"))["iter_num"] == 40


def test_processes_end_when_one_of_them_no_longer_answers(options, tmp_path):
    first, second = pair(*options, f"--out_dir={tmp_path}", "--timeout=3", "--max_iters=100000")
    read_until(first, "5 | loss ")
    second.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    said = first.communicate(timeout=60)[0]
    second.kill()
    assert first.returncode == 1 and "Traceback" not in said and time.monotonic() - began < 30
    assert (
        "train.py: rank 0: this process ends because another process did not answer "
        "for 3 s (--timeout)" in said
    )
    second.communicate()


@linux_only
@pytest.mark.slow
def test_run_survives_a_lost_machine_that_comes_back(options, undisturbed, tmp_path):
    """Two agents of torchrun, as two machines start them. Without the environment variable the
    first waited forever for the second: PyTorch sends the address of its store in the first
    round only."""
    alive = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
    place = (
        "--nnodes=2",
        "--max-restarts=5",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{free_port()}",
    )
    slowly = (
        "--max_iters=40",
        "--checkpoint_interval=1",
        "--eval_iters=40",
        f"--out_dir={tmp_path}",
        "--timeout=20",
    )
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(is_host: int) -> subprocess.Popen:  # of what all of them meet at
        conf = ("--rdzv-id=any", f"--rdzv-conf=is_host={is_host},{alive}")
        return run(1, *options, *slowly, torchrun=(*place, *conf), env=environment)

    first, second = start(1), start(0)
    read_until(first, "5 | loss ")
    for pid in [second.pid, *children(second.pid)]:
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    second = start(0)
    said = first.communicate(timeout=180)[0]
    assert (
        first.returncode == 0 and "rank 0: this process ends because another one is gone" in said
    ), said
    assert second.communicate(timeout=180) and second.returncode == 0
    assert "init_from = 'resume'" in said and max_weight_difference(undisturbed, tmp_path) < 1e-5
