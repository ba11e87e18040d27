import threading

import pytest
import torch
import torch.distributed as dist

from runtime.distributed import (
    DistContext,
    full_tensor,
    init_distributed,
    is_dtensor,
    negotiate_store_prefix,
    read_environment,
    shard_like,
    translate_dist_errors,
)

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_needs_no_communication(no_torchrun):
    dist_ctx, device = init_distributed("cpu")
    assert (dist_ctx, device) == (DistContext(0, 0, 1), "cpu")
    assert dist_ctx.is_main and dist_ctx.all_reduce_sum([1.5, 2.0]) == [1.5, 2.0]
    assert dist_ctx.all_equal(7) and dist_ctx.any_rank(True) and not dist_ctx.any_rank(False)
    dist_ctx.barrier()


def test_the_ranks_come_from_the_environment(no_torchrun, monkeypatch):
    for name, value in zip(VARIABLES, ("3", "1", "4", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert read_environment() == DistContext(3, 1, 4)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="but not WORLD_SIZE; start with torchrun, or unset it"):
        init_distributed("cpu")


def negotiate(store: dist.Store, size: int) -> list[str]:
    """The prefix that each of so many ranks, in threads, agrees to."""
    prefixes = [""] * size

    def run(rank: int):
        prefixes[rank] = negotiate_store_prefix(store, DistContext(rank, rank, size), timeout=20)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return prefixes


def test_ranks_agree_on_a_new_prefix_at_every_start():
    """torchrun's store keeps the keys of the processes before a restart."""
    store = dist.HashStore()
    first, second = (negotiate(store, size=3) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] and second[0] and first != second


def test_a_missing_rank_is_reported_after_the_timeout():
    with pytest.raises(ValueError, match=r"not all of the 2 processes came within 0\.1 s"):
        negotiate_store_prefix(dist.HashStore(), DistContext(0, 0, 2), timeout=0.1)


@pytest.mark.parametrize(
    "message, reason",
    [
        ("[gloo] Timed out waiting 1000ms", "another process did not answer for 1 s"),
        ("Connection closed by peer [127.0.0.1]", "another one is gone"),
    ],
)
def test_errors_of_lost_processes_are_one_sentence(message, reason):
    with (
        pytest.raises(ValueError, match=f"this process ends because {reason}"),
        translate_dist_errors("for 1 s"),
    ):
        raise RuntimeError(message)


def test_other_runtime_errors_pass():
    with pytest.raises(RuntimeError, match="shape mismatch"), translate_dist_errors("for 1 s"):
        raise RuntimeError("shape mismatch")


def test_a_plain_tensor_is_neither_gathered_nor_sharded():
    tensor = torch.ones(3)
    assert not is_dtensor(tensor)
    assert full_tensor(tensor) is tensor and shard_like(tensor, torch.zeros(3)) is tensor
