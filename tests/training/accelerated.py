"""One of the processes of test_processes.py: MODEL FOLDER, started by torch.distributed.run.

Every process has the whole model, and takes its rows of each batch. It writes its memory, and the losses of
each way to train.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import adamw, batches, trainable

import kt_kernel.training as training

DATA = batches(1, rows=2) * 4
_SHARED = "memfd:kt_trained_experts"


def main(model_path: str, folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    before = anonymous()
    model = trainable(Path(model_path), threads=1)
    memory = {"anonymous": anonymous() - before, **shared()}
    memory["cpus"] = sorted(os.sched_getaffinity(0))
    write(folder, f"memory-{accelerator.process_index}", memory)
    write(folder, f"accelerate-{accelerator.process_index}", accelerated(accelerator, model))
    write(folder, f"fsdp2-{accelerator.process_index}", sharded(accelerator, Path(model_path)))
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of one process may wait for those of one that has ended


def accelerated(accelerator: Accelerator, model: nn.Module) -> list[float]:
    """DDP of everything."""
    model, optimizer = accelerator.prepare(model, small_steps(model))
    return steps(accelerator, model, optimizer, accelerator.backward)


def sharded(accelerator: Accelerator, path: Path) -> list[float]:
    """FSDP2 of everything beside the experts."""
    model = trainable(path, threads=1)
    with torch.no_grad():  # as another seed of each process would have drawn them
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".experts." in name:
                parameter += accelerator.process_index
    ignored = training.average_gradients(model)
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return steps(accelerator, model, small_steps(model), torch.Tensor.backward)


def small_steps(model: nn.Module) -> torch.optim.Optimizer:
    """With larger ones rounding shows: a random router soon sends some token to another expert."""
    return adamw(model, lr=2e-4)


def steps(accelerator: Accelerator, model: nn.Module, optimizer, backward) -> list[float]:
    losses = []
    for batch in DATA:
        ids = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    return losses


def anonymous() -> int:
    """Bytes that this process alone has."""
    return 1024 * int(re.search(r"Pss_Anon:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])


def shared() -> dict[str, int]:
    """Bytes of the shared experts: mapped and touched here, and this process's part of them."""
    found = {"rss": 0, "pss": 0}
    for mapping in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        if _SHARED in mapping:
            for name in found:
                size = re.search(rf"^{name}:\s+(\d+)", mapping, re.IGNORECASE | re.MULTILINE)
                found[name] += 1024 * int(size[1])
    return found


def write(folder: str, name: str, value: object) -> None:
    (Path(folder) / f"{name}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
