"""DETR: two tasks for nine losses, weighed as its configuration says."""

import torch
from torch.optim import AdamW
from torch.testing import assert_close

from examples.detr import make_batch, make_model, tasks_of, train
from tests.examples.oracle import theorem_1

STEPS = 8


def test_it_trains_as_a_literal_loop_on_the_weighted_losses_of_each_kind() -> None:
    # Without dropout, which the model draws anew at each step.
    model, expected = make_model().eval(), make_model().eval()
    cosines = train(model, STEPS)
    parameters = [p for p in expected.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=1e-3)
    literal = []
    for step in range(STEPS):
        images, labels = make_batch(step)
        losses = expected(pixel_values=images, labels=labels).loss_dict
        sums = {
            kind: sum(losses[f"loss_{kind}{aux}"] for aux in ("", "_0", "_1"))
            for kind in ("ce", "bbox", "giou")
        }
        tasks = [sums["ce"], 5 * sums["bbox"] + 2 * sums["giou"]]
        grads = [
            torch.autograd.grad(
                task, parameters, retain_graph=True, materialize_grads=True
            )
            for task in tasks
        ]
        first, second = (torch.cat([g.flatten() for g in gs]).double() for gs in grads)
        literal.append((first @ second / first.norm() / second.norm()).item())
        weights = theorem_1(first, second)
        for parameter, one, other in zip(parameters, *grads, strict=True):
            parameter.grad = weights[0] * one + weights[1] * other
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    assert 0 < sum(cosine < 0 for cosine in literal) < STEPS
    assert_close(cosines, literal, rtol=0, atol=1e-3)
    assert_close([*model.parameters()], [*expected.parameters()], rtol=0, atol=1e-4)


def test_every_loss_has_its_task() -> None:
    images, labels = make_batch(0)
    losses = make_model()(pixel_values=images, labels=labels).loss_dict
    grouped = [id(loss) for task in tasks_of(losses).values() for loss in task]
    trained = [id(loss) for loss in losses.values() if loss.requires_grad]
    assert len(trained) == 9
    assert sorted(grouped) == sorted(trained)
