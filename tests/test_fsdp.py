"""A student's head whose parameters FSDP2 shards: gathered for the forward, their gradients scattered after it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import FUSED
from torch import nn

import fastkd
from fastkd import Head

N, V, D, RANKS = 12, 101, 16, 2


class Student(nn.Module):
    """A layer and a head; the loss is made where the head's weight is whole."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x, teacher, **kwargs):
        return fastkd.kd_loss(Head(torch.tanh(self.body(x)), self.head.weight, self.head.bias), teacher, **kwargs)


def problem():
    torch.manual_seed(0)
    return Student(), torch.randn(RANKS * N, D), torch.randn(RANKS * N, V)


def sharded(rank, folder, calls):
    """One rank: the gradients of each call (backend, compiled), gathered."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    grads = []
    for backend, compiled in calls:
        student, x, teacher = problem()
        fully_shard(student, mesh=dist.init_device_mesh("cpu", (RANKS,)))
        step = torch.compile(student) if compiled else student
        mine = slice(rank * N, (rank + 1) * N)
        step(x[mine], teacher[mine], chunk_tokens=5, backend=backend).backward()
        grads.append({name: p.grad.full_tensor() for name, p in student.named_parameters()})
    try:
        fastkd.kd_loss(Head(x, student.head.weight), teacher)
    except TypeError as error:
        torch.save((grads, str(error)), folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What rank 0 found: gradients of each call, and what it was told of a weight that is not whole."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(sharded, (folder, CALLS), nprocs=RANKS)
    return torch.load(folder / "0")


CALLS = [*((name, False) for name in FUSED), (FUSED[0], True)]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_two_ranks_are_one_process(ranks, call):
    student, x, teacher = problem()
    student(x, teacher, backend="reference").backward()
    for name, grad in ranks[0][CALLS.index(call)].items():
        torch.testing.assert_close(grad, student.get_parameter(name).grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_weight_that_is_not_whole_is_refused(ranks):
    assert ranks[1] == (
        "student.weight must be a plain tensor, got a DTensor: call in the forward of the module that FSDP2 gathers, "
        "or give weight.full_tensor()"
    )
