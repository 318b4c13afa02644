"""pytorch-forecasting: a Temporal Fusion Transformer with several targets, each a task.

Run it with `python -m examples.forecasting_tft`.

For whom: you train a model of `pytorch_forecasting` on several targets, so that its loss is a
`MultiLoss`. Its `training_step` belongs to the package and returns one sum. Other packages of
LightningModules can be served in the same way, where the losses can be got at.

What changes: three methods in a subclass. Hooks keep the loss of each target when `MultiLoss`
calls it; `backward` runs one pass for each, with the weight that it has in the sum (`total=`);
`on_before_optimizer_step` harmonizes what the micro-batches left, before Lightning clips. The
optimizer is a function, `optimizer=harmonized_adam`.

What you get: a step that opposes none of the targets. Accumulation, clipping and checkpoints
are those of Lightning.

Limits: one process, since DDP would average the first pass only, which ghopt refuses. No
`monotone_constraints`: they multiply the sum, and have a gradient of their own.

Versions: run by hand on 2026-11-29, with pytorch-forecasting 1.8.0, lightning 2.6.6, pandas
3.0.6 and torch 2.13.0 on a CPU. With `plain_sum` as the weighting, three epochs of SGD ended as
the plain model's, but for 3e-6 of the way that the parameters went. It wants an older pandas
than our tests have, which run this script only where they find the package.
"""

from collections.abc import Iterable
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import MultiLoss, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import MultiNormalizer, TorchNormalizer
from pytorch_forecasting.metrics import MAE
from torch import Tensor
from torch.optim import Adam, Optimizer

from ghopt import HarmonizedOptimizer


def harmonized_adam(params: Iterable[Tensor], **options: Any) -> HarmonizedOptimizer:
    """Make the optimizer; takes what the model passes on: rate and weight decay."""
    return HarmonizedOptimizer(Adam(params, **options))


class HarmonizedTFT(TemporalFusionTransformer):  # type: ignore[misc]  # it has no types
    """A Temporal Fusion Transformer whose targets are tasks."""

    def on_fit_start(self) -> None:
        """Have each loss kept when it is computed."""
        super().on_fit_start()
        self.losses: dict[str, Tensor] = {}
        for name, metric in zip(self.target_names, self.loss.metrics, strict=True):

            def keep(_: Any, __: Any, value: Tensor, name: str = name) -> None:
                self.losses[name] = value

            metric.register_forward_hook(keep)

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Run one pass for each target."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.backward(self.losses, total=loss, accumulate_only=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Harmonize, before the gradient is clipped."""
        super().on_before_optimizer_step(optimizer)
        self.optimizers(use_pl_optimizer=False).finish_accumulation()


def make_data() -> TimeSeriesDataSet:
    """Give four series of two targets that both follow one wave, with opposite signs."""
    generator = np.random.default_rng(0)
    time = np.arange(40)
    parts = []
    for series in range(4):
        wave = np.sin(time / 3 + series) + 0.1 * generator.normal(size=40)
        columns = {"time": time, "series": str(series), "wave": wave}
        parts.append(pd.DataFrame(columns | {"up": wave, "down": -wave}))
    return TimeSeriesDataSet(
        pd.concat(parts, ignore_index=True),
        time_idx="time",
        target=["up", "down"],
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["up", "down"],
        target_normalizer=MultiNormalizer([TorchNormalizer(), TorchNormalizer()]),
    )


def make_model(data: TimeSeriesDataSet, weights: list[float]) -> HarmonizedTFT:
    """Give a small model; the weights are those of the two targets in the sum."""
    torch.manual_seed(0)
    model: HarmonizedTFT = HarmonizedTFT.from_dataset(
        data,
        hidden_size=8,
        hidden_continuous_size=4,
        attention_head_size=1,
        dropout=0.0,
        loss=MultiLoss([MAE(), MAE()], weights),
        output_size=[1, 1],
        optimizer=harmonized_adam,
        learning_rate=0.01,
    )
    return model


def train(model: HarmonizedTFT, data: TimeSeriesDataSet, epochs: int = 2) -> None:
    """Train in steps of two micro-batches, with clipping."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = data.to_dataloader(train=True, batch_size=16, num_workers=0)
    trainer.fit(model, train_dataloaders=loader)


def main() -> None:
    """Train, and print the weights of the last step."""
    data = make_data()
    model = make_model(data, [1.0, 2.0])
    train(model, data)
    last = model.optimizers(use_pl_optimizer=False).last
    print(f"cosine of {last.names[0]} and {last.names[1]}: {last.cosines[0, 1]:+.2f}")


if __name__ == "__main__":
    main()
