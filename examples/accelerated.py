"""Accelerate: keep the optimizer that went into `prepare`, and call its `backward`.

Run it with `python -m examples.accelerated`, or on two processes with
`torchrun --nproc-per-node 2 -m examples.accelerated`. What `prepare` gives back
steps and clears as always, but does not forward `backward`.
"""

from accelerate import Accelerator
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer


class Training:
    """A prepared model with all that trains it: `accelerator.save_state` saves it.

    Args:
        accelerator: decides on device, precision, processes and accumulation.
        model: gives the outputs of both tasks; changed in place.
        data: inputs ``[n, 6]`` and targets ``[n, 2]``.
        batch_size: of a micro-batch on one process.
        clip: norm that the harmonized gradient is clipped to, if any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: TwoHeads,
        data: TensorDataset,
        *,
        batch_size: int = 8,
        clip: float | None = None,
    ) -> None:
        self.accelerator, self.clip = accelerator, clip
        base = SGD(model.parameters(), lr=0.02, momentum=0.9)
        self.harmonized = HarmonizedOptimizer(base)
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            model,
            self.harmonized,
            DataLoader(data, batch_size),
            ExponentialLR(self.harmonized, 0.9),
        )

    def epoch(self) -> None:
        """Train on harmonized gradients, once over the data."""
        accelerator, model = self.accelerator, self.model
        several = accelerator.num_processes > 1
        for inputs, targets in self.loader:
            # no_sync: each task is averaged over the processes by itself, see sync_group.
            with accelerator.accumulate(model), accelerator.no_sync(model):
                self.harmonized.backward(
                    task_losses(model(inputs), targets),
                    backward_fn=accelerator.backward,
                    accumulate_only=not accelerator.sync_gradients,
                    sync_group=True if several else None,
                )
                if accelerator.sync_gradients and self.clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), self.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def main() -> None:
    """Train in bfloat16 for ten epochs of four steps."""
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
    )
    model = TwoHeads()
    training = Training(accelerator, model, TensorDataset(*make_data()), clip=5.0)
    for _ in range(10):
        training.epoch()
    inputs, targets = make_data()
    accelerator.print(task_losses(model(inputs), targets))


if __name__ == "__main__":
    main()
