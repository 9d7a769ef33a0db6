"""DDP and FSDP2 in two processes on CPUs (gloo): gradients against those of one process.

    python -m benchmarks.integrations.distributed [ARCHITECTURE ...]    # prints one JSON line a case

Each process has one item of the batch; the gradient is the mean of what each item gives alone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.integrations.architectures import ARCHITECTURES
from benchmarks.integrations.outcomes import outcome_of
from benchmarks.integrations.setting import Setting, scores, trainable

PROCESSES = 2


def _item(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """A batch of its own, of one item twice: a batch norm in a head that is trained takes no single one."""
    found = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            one = value[index : index + 1]
            found[key] = torch.cat([one, one * 0.9 if one.is_floating_point() else one])
        else:
            found[key] = value if isinstance(value, bool) else [value[index]] * 2
    return found


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.")] = full.clone()
    return found


def _expected(setting: Setting) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for index in range(PROCESSES):
        model = setting.adapt(activation_bits=None).train()
        model(**_item(setting.batch, index)).loss.backward()
        for name, gradient in _gradients(model).items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient / PROCESSES
    return total


def _step_twice(model: Any, setting: Setting, rank: int) -> dict[str, Tensor]:
    """Gradients of the first of two steps: a parameter that is not used shows in the second."""
    optimizer = torch.optim.SGD(list(trainable(model).values()), lr=0.0)
    first: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        model(**_item(setting.batch, rank)).loss.backward()
        optimizer.step()
        first = first or _gradients(model)
    return first


def ddp(setting: Setting, rank: int) -> None:
    """`DistributedDataParallel`, without a search for unused parameters."""
    model = DistributedDataParallel(setting.adapt(activation_bits=None).train())
    torch.testing.assert_close(_step_twice(model, setting, rank), _expected(setting), rtol=1e-3, atol=1e-5)


def fsdp2(setting: Setting, rank: int) -> None:
    """`fully_shard`: frozen weights in shards, adapters trained; the shards hold what the whole model held."""
    model = setting.adapt(activation_bits=None)
    expected = scores(model.eval(), setting.batch)
    fully_shard(model)
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    torch.testing.assert_close(scores(model, setting.batch), expected, rtol=1e-4, atol=1e-5)
    found = _step_twice(model.train(), setting, rank)
    torch.testing.assert_close(found, _expected(setting), rtol=1e-3, atol=1e-5)


CASES: dict[str, Callable[[Setting, int], None]] = {"DDP, 2 processes": ddp, "FSDP2, 2 processes": fsdp2}


def _process(rank: int, port: int, names: list[str], results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for integration, case in CASES.items():
        for name in names:
            found = outcome_of(lambda setting, case=case: case(setting, rank), name)
            if rank == 0:
                results.put({"integration": integration, "architecture": name, **found})
            dist.barrier()
    dist.destroy_process_group()


def run(names: list[str]) -> list[dict[str, Any]]:
    """The outcomes of both cases for these architectures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (port, names, results), nprocs=PROCESSES)
    return [results.get() for _ in range(len(CASES) * len(names))]


if __name__ == "__main__":
    for line in run(sys.argv[1:] or list(ARCHITECTURES)):
        print(json.dumps(line))
