"""A job for torchrun that one rank leaves in the middle, and that goes on from there.

Arguments: a folder, and the step in which rank 1 kills itself the first time, or -1.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from ghopt import HarmonizedOptimizer
from tests import models

STEPS = 12
EVERY = 3


def main(folder: Path, doomed: int) -> None:
    """Train, with a checkpoint every few steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    start = 0
    done = [
        int(path.name)
        for path in folder.glob("[0-9]*")
        if (path / ".metadata").exists()
    ]
    if done:
        start = max(done)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        saved = {"model": model_state, "optimizer": optimizer_state}
        load(saved, checkpoint_id=folder / str(start))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
        )
    for step in range(start, STEPS):
        inputs, targets = models.batch(2, step)
        inputs, targets = inputs.chunk(size)[rank], targets.chunk(size, dim=1)[rank]
        optimizer.zero_grad()
        with ddp.no_sync():
            losses = ddp(inputs, targets)
            first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if rank == 1 and step == doomed and first_time:
                losses[1].register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
            optimizer.backward(losses, sync_group=ddp)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            saved = {"model": model_state, "optimizer": optimizer_state}
            save(saved, checkpoint_id=folder / str(step + 1))
    with (folder / f"starts{rank}").open("a", encoding="utf-8") as file:
        file.write(f"{start}\n")
    torch.save(model.state_dict(), folder / f"weights{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    # Not while the DDP model lives: as the last to hold the group it would wait for
    # gloo's thread, which may wait for the GIL.
    dist.destroy_process_group()
