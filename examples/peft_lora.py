"""LoRA with PEFT: several losses on a large frozen model, at the price of its adapters.

Run it with `python -m examples.peft_lora`.

For whom: you fine-tune a model too large for one gradient per task, on several tasks or data
sets at once.

What changes: nothing for PEFT's sake. Wrap the optimizer as always; all parameters of the
model may go in. Frozen ones have no gradient, so ghopt keeps, multiplies and sums those of the
adapters alone. Each task may have a batch of its own, as here.

What you get: a step that sets no task back, within what the adapters can do. Its memory is K
gradients of the adapters instead of K of the model, and so is what is sent between processes.
The K backward passes remain: they run through the frozen layers, too. `measure_every=4` saves
most of them.

Limits: conflict is measured in the adapters. Whether the frozen weights would be in conflict is
not asked. At the first step `B` of each adapter is zero and `A` has no gradient, so the first
cosines are those of `B` alone. Quantized bases (QLoRA) were not tried.

Versions: peft 0.21.2 and transformers 5.24.0, in each run of our tests. Nothing is downloaded:
the model is a GPT-2 of random weights.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from ghopt import HarmonizedOptimizer

WORDS = 64


def make_model(rank: int = 8) -> nn.Module:
    """Give a small GPT-2 whose weights are frozen, with adapters at its attention."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=32,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,  # GPT-2 keeps its weights transposed
    )
    model: nn.Module = get_peft_model(GPT2LMHeadModel(config), adapters)
    return model


def make_batch(step: int, rows: int = 8) -> dict[str, Tensor]:
    """Draw sentences ``[rows, 16]`` of two tasks: count up by 1, and count down by 1."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(WORDS, (rows, 1), generator=generator)
    return {
        "up": (starts + torch.arange(16)) % WORDS,
        "down": (starts - torch.arange(16)) % WORDS,
    }


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the loss of the next word, of each task."""
    return {name: model(input_ids=x, labels=x).loss for name, x in batch.items()}


def train(model: nn.Module, steps: int = 30) -> HarmonizedOptimizer:
    """Train the adapters on harmonized gradients."""
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    for step in range(steps):
        optimizer.step(losses=losses_of(model, make_batch(step)))
    return optimizer


def main() -> None:
    """Train, and print what is trained and what the losses became."""
    model = make_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    optimizer = train(model)
    last = optimizer.last
    assert last is not None  # step has harmonized
    losses = losses_of(model, make_batch(-1))
    shown = ", ".join(f"{name} {loss.item():.2f}" for name, loss in losses.items())
    print(f"{trained} parameters of adapters are harmonized, {frozen} are frozen")
    print(f"losses: {shown}, cosine {float(last.cosines[0, 1]):+.2f}")


if __name__ == "__main__":
    main()
