"""One of the processes of test_trainer.py: MODEL LOSSES, started by torch.distributed.run.

Every process has the whole model, and takes its rows of each batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from accelerate import Accelerator
from training_runs import adamw, batches, trainable


def main(model_path: str, losses_path: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = trainable(Path(model_path), backend="reference")
    model, optimizer = accelerator.prepare(model, adamw(model))
    losses = []
    for batch in batches(4, rows=2):
        ids = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    if accelerator.is_main_process:
        Path(losses_path).write_text(json.dumps(losses))
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of one process may wait for those of one that has ended


if __name__ == "__main__":
    main(*sys.argv[1:])
