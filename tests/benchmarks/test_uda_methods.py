"""The methods: losses against literal loops, and who is moved by which step."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import ghopt
from benchmarks.uda.data import Batch, Task, batches
from benchmarks.uda.methods import (
    Losses,
    cdan_losses,
    dann_losses,
    discrepancy,
    domain_loss,
    entropy_weights,
    mcd_heads_loss,
    mcd_losses,
    outer_product,
    warm_up,
)
from benchmarks.uda.methods.networks import Networks, build_networks, reverse_gradient
from benchmarks.uda.methods.rules import (
    ALL_RULES,
    LAMBDAS,
    RULES,
    find_rule,
    harmonized_gramian,
)
from benchmarks.uda.methods.steps import (
    ALL_METHODS,
    METHODS,
    Config,
    Step,
    descend,
    generator_step,
    make_step,
)
from benchmarks.uda.methods.updates import (
    Update,
    harmonized,
    looking_at_unrelated,
    plain_update,
    unrelated_gramians,
)
from benchmarks.uda.runs import train
from ghopt import Recorder
from tests.benchmarks.modules import gradients, same, values


def test_gradient_reversal_keeps_values_and_negates_and_scales_gradients() -> None:
    x = torch.tensor([1e-8, -3.0, 7e12], requires_grad=True)
    out = reverse_gradient(x, 0.3)
    assert out.equal(x)
    weights = torch.tensor([1.0, 2.0, -4.0])
    (gradient,) = torch.autograd.grad(out @ weights, x)
    torch.testing.assert_close(gradient, -0.3 * weights)


def test_reversal_warms_up_from_0_to_1() -> None:
    assert warm_up(0) == 0
    assert math.isclose(warm_up(0.1), 2 / (1 + math.exp(-1)) - 1)
    assert warm_up(0.2) < warm_up(0.5) < warm_up(1) < 1


def test_outer_product_and_entropy_weights_are_those_of_literal_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 3, generator=generator)
    probabilities = torch.randn(6, 4, generator=generator).softmax(1)
    products = outer_product(features, probabilities)
    for n in range(6):
        for c in range(4):
            for f in range(3):
                expected = probabilities[n, c] * features[n, f]
                assert products[n, c * 3 + f] == expected
    literal = []
    for n in range(6):
        entropy = -sum(p * math.log(p) for p in probabilities[n].tolist())
        literal.append(1 + math.exp(-entropy))
    weights = entropy_weights(probabilities).tolist()
    for half in (slice(0, 3), slice(3, 6)):
        scale = sum(literal[half]) / 3
        assert weights[half] == pytest.approx([one / scale for one in literal[half]])


def test_entropy_weights_survive_a_certain_prediction_in_backward() -> None:
    logits = torch.tensor([[500.0, 0.0], [0.0, 0.1]], requires_grad=True)
    total = entropy_weights(logits.softmax(1)).square().sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.isfinite().all()


def test_the_domain_loss_is_the_literal_cross_entropy() -> None:
    logits = torch.tensor([[0.3], [-1.0], [2.0], [0.0]])
    weights = torch.tensor([1.5, 0.5, 0.25, 1.75])
    p = logits.flatten().sigmoid()
    literal = torch.stack(
        [-p[0].log(), -p[1].log(), -(1 - p[2]).log(), -(1 - p[3]).log()]
    )
    torch.testing.assert_close(domain_loss(logits), literal.mean())
    torch.testing.assert_close(domain_loss(logits, weights), (weights * literal).mean())


@pytest.mark.parametrize("losses_of", [dann_losses, cdan_losses])
def test_discriminator_and_generator_pull_the_alignment_loss_opposite_ways(
    batch: Batch, losses_of: Callable[..., Losses]
) -> None:
    method = "DANN" if losses_of is dann_losses else "CDAN+E"
    networks = build_networks(method, seed=0).eval()  # no dropout: one loss
    pairs = {c: losses_of(networks, batch, c, 1.0) for c in (1.0, 0.5, 0.0, -1.0)}
    assert len({pair.alignment.item() for pair in pairs.values()}) == 1
    # Coefficient -1 undoes the reversal: the plain gradient of the same loss.
    plain = gradients(pairs[-1.0].alignment, networks.generator)
    for c in (1.0, 0.5, 0.0):
        reversed_ = gradients(pairs[c].alignment, networks.generator)
        for a, b in zip(reversed_, plain, strict=True):
            torch.testing.assert_close(a, -c * b)
        for a, b in zip(
            gradients(pairs[c].alignment, networks.discriminator),
            gradients(pairs[-1.0].alignment, networks.discriminator),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def literal_domain_loss(d: Tensor, weights: list[float]) -> float:
    """The weighted mean of -log of what the discriminator says of each true domain."""
    count = len(weights)
    return (
        sum(
            -w * math.log(said if n < count // 2 else 1 - said)
            for n, (w, said) in enumerate(zip(weights, d.tolist(), strict=True))
        )
        / count
    )


def literal_entropy(networks: Networks, batch: Batch) -> float:
    probabilities = networks.heads[0](networks.generator(batch.source)).softmax(1)
    chosen = probabilities[torch.arange(len(batch.labels)), batch.labels]
    return -sum(map(math.log, chosen.tolist())) / len(batch.labels)


def test_dann_s_losses_are_the_literal_sums(batch: Batch) -> None:
    networks = build_networks("DANN", seed=0).eval()
    losses = dann_losses(networks, batch, 1.0, trade_off=2.0)
    features = networks.generator(torch.cat([batch.source, batch.target]))
    d = networks.discriminator(features).sigmoid().flatten()
    expected = 2 * literal_domain_loss(d, [1.0] * 16)
    assert losses.alignment.item() == pytest.approx(expected, rel=1e-5)
    expected = literal_entropy(networks, batch)
    assert losses.classification.item() == pytest.approx(expected, rel=1e-5)


def test_cdan_s_losses_are_the_literal_sums(batch: Batch) -> None:
    networks = build_networks("CDAN+E", seed=0).eval()
    with torch.no_grad():
        for parameter in networks.heads.parameters():
            parameter.mul_(20)  # or all predictions are as uncertain
        for parameter in networks.discriminator.parameters():
            parameter.mul_(3)
    losses = cdan_losses(networks, batch, 1.0, trade_off=2.0)
    features = networks.generator(torch.cat([batch.source, batch.target]))
    p = networks.heads[0](features).softmax(1)
    rows = [
        torch.cat([p[n, c] * features[n] for c in range(p.shape[1])])
        for n in range(len(p))
    ]
    d = networks.discriminator(torch.stack(rows)).sigmoid().flatten()
    certain = [1 + math.exp(sum(q * math.log(q) for q in row)) for row in p.tolist()]
    weights = [w / (sum(half) / 8) for half in (certain[:8], certain[8:]) for w in half]
    assert max(weights) > 1.05 * min(weights)
    expected = 2 * literal_domain_loss(d, weights)
    assert losses.alignment.item() == pytest.approx(expected, rel=1e-5)
    expected = literal_entropy(networks, batch)
    assert losses.classification.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("part", ["features", "predictions", "certainty"])
def test_cdan_s_alignment_reaches_g_by_features_predictions_and_certainty(
    batch: Batch, part: str
) -> None:
    networks = build_networks("CDAN+E", seed=0).eval().double()
    batch = Batch(batch.source.double(), batch.labels, batch.target.double())
    with torch.no_grad():
        for parameter in networks.heads.parameters():
            parameter.mul_(20)

    def literal(frozen: str | None) -> Tensor:
        """The alignment loss, with one of its three ways to G cut."""
        features = networks.generator(torch.cat([batch.source, batch.target]))
        p = networks.heads[0](features).softmax(1)
        certain = 1 + (p * p.log()).sum(1).exp()
        weights = certain / certain.view(2, 8).mean(1).detach().repeat_interleave(8)
        if frozen == "features":
            features = features.detach()
        if frozen == "predictions":
            p = p.detach()
        if frozen == "certainty":
            weights = weights.detach()
        rows = torch.einsum("nc,nf->ncf", p, features).flatten(1)
        d = networks.discriminator(rows).sigmoid().flatten()
        said = torch.cat([d[:8], 1 - d[8:]])
        loss: Tensor = -(weights * said.log()).mean()
        return loss

    found = gradients(
        cdan_losses(networks, batch, 1.0, 1.0).alignment, networks.generator
    )
    whole = gradients(literal(None), networks.generator)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, -other)
    cut = gradients(literal(part), networks.generator)
    assert not all(map(torch.allclose, whole, cut))


@pytest.mark.parametrize("method", ALL_METHODS[1:])
def test_a_step_s_losses_have_its_trade_off_and_its_progress(
    batch: Batch, method: str
) -> None:
    def pair(trade_off: float, progress: float) -> tuple[float, float, Tensor]:
        """Both losses, and the first's gradient for G, of the second step."""
        found: list[tuple[float, float, Tensor]] = []
        config = Config("", method, "sum", 0, 8, lr=0.0, trade_off=trade_off)
        networks = build_networks(method, seed=0).eval()

        def make_update(_sgd: SGD, _shared: Iterable[nn.Parameter]) -> Update:
            def update(losses: Losses) -> None:
                pulled = gradients(losses.alignment, networks.generator)
                flat = torch.cat([one.flatten() for one in pulled])
                alignment, classification = (loss.item() for loss in losses)
                found.append((alignment, classification, flat))

            return update

        step = make_step(config, networks, make_update)
        for _ in range(2):
            torch.manual_seed(3)  # SSRT draws
            step(batch, progress)
        return found[1]

    one, three = pair(1.0, 0.5), pair(3.0, 0.5)
    assert one[0] != 0
    assert three[0] == pytest.approx(3 * one[0], rel=1e-5)
    assert three[1] == pytest.approx(one[1], rel=1e-5)
    # The reversal's coefficient starts at 0; nothing is reversed in MCD and DWL.
    early = pair(1.0, 0.0)
    assert early[0] == pytest.approx(one[0], rel=1e-5)
    moved = not torch.allclose(early[2], one[2], atol=1e-9)
    assert moved == (method not in ("MCD", "DWL"))
    if method in ("DANN", "CDAN+E"):
        assert early[2].abs().max() == 0
        half = pair(1.0, 0.1)
        torch.testing.assert_close(one[2] * warm_up(0.1), half[2] * warm_up(0.5))


def test_the_trade_off_is_part_of_the_alignment_loss_alone(batch: Batch) -> None:
    methods: dict[str, Callable[..., Losses]] = {
        "DANN": partial(dann_losses, coefficient=1.0),
        "CDAN+E": partial(cdan_losses, coefficient=1.0),
        "MCD": mcd_losses,
    }
    for method, losses_of in methods.items():
        networks = build_networks(method, seed=0).eval()
        one = losses_of(networks, batch, trade_off=1.0)
        three = losses_of(networks, batch, trade_off=3.0)
        torch.testing.assert_close(three.alignment, 3 * one.alignment)
        assert three.classification.equal(one.classification)


def test_cdan_detaches_neither_predictions_nor_weights(batch: Batch) -> None:
    networks = build_networks("CDAN+E", seed=0)
    losses = cdan_losses(networks, batch, 1.0, 1.0)
    assert all(g.abs().max() > 0 for g in gradients(losses.alignment, networks.heads))


def test_the_discrepancy_is_the_mean_absolute_difference(batch: Batch) -> None:
    networks = build_networks("MCD", seed=0).eval()
    features = networks.generator(batch.target)
    first, second = (head(features).softmax(1) for head in networks.heads)
    total = sum(
        abs((first[n, c] - second[n, c]).item()) for n in range(8) for c in range(10)
    )
    assert discrepancy(networks, features).item() == pytest.approx(total / 80)


def test_step_b_of_mcd_leaves_the_generator_and_its_gradients_alone(
    batch: Batch,
) -> None:
    networks = build_networks("MCD", seed=0)
    generator, heads = values(networks.generator), values(networks.heads)
    heads_sgd = SGD(networks.heads.parameters(), lr=0.1)
    descend(mcd_heads_loss(networks, batch, 1.0), heads_sgd)
    assert same(generator, values(networks.generator))
    assert all(p.grad is None for p in networks.generator.parameters())
    assert not same(heads, values(networks.heads))


def test_step_b_of_mcd_raises_the_discrepancy_and_step_c_lowers_it(
    batch: Batch,
) -> None:
    networks = build_networks("MCD", seed=0).eval()

    def now() -> float:
        return discrepancy(networks, networks.generator(batch.target)).item()

    start = now()
    heads = SGD(networks.heads.parameters(), lr=0.01)
    descend(mcd_heads_loss(networks, batch, trade_off=100.0), heads)
    raised = now()
    assert raised > start
    generator = SGD(networks.generator.parameters(), lr=0.001)
    update = plain_update(generator, networks.generator.parameters())
    losses = partial(mcd_losses, networks, batch, trade_off=100.0)
    generator_step(networks, update, losses, times=1)
    assert now() < raised


@pytest.mark.parametrize("rule", RULES)
def test_step_c_of_mcd_leaves_the_heads_and_their_gradients_alone(
    batch: Batch, rule: str
) -> None:
    networks = build_networks("MCD", seed=0)
    generator, heads = values(networks.generator), values(networks.heads)
    sgd = SGD(networks.generator.parameters(), lr=0.1)
    recorder = Recorder()
    shared = networks.generator.parameters()
    update = harmonized(sgd, shared, rule=rule, recorder=recorder)
    losses = partial(mcd_losses, networks, batch, 1.0)
    generator_step(networks, update, losses, times=2)
    assert same(heads, values(networks.heads))
    assert all(p.grad is None and p.requires_grad for p in networks.heads.parameters())
    assert not same(generator, values(networks.generator))
    assert recorder.count == 2


def test_a_step_of_mcd_is_its_three_steps_taken_literally(batch: Batch) -> None:
    config = Config("", "MCD", "sum", 0, 2, lr=0.1, trade_off=30.0, inner_steps=3)
    batch = Batch(batch.source.double(), batch.labels, batch.target.double())
    ours, literal = (build_networks("MCD", seed=0).eval().double() for _ in range(2))
    step = make_step(config, ours, plain_update)
    generator, heads = (
        SGD(one.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        for one in (literal.generator, literal.heads)
    )

    def losses() -> tuple[Tensor, Tensor]:
        source, target = map(literal.generator, (batch.source, batch.target))
        entropy = torch.tensor(0.0)
        for head in literal.heads:
            p = head(source).softmax(1)
            entropy = entropy - p[torch.arange(len(p)), batch.labels].log().mean()
        one, other = (head(target).softmax(1) for head in literal.heads)
        return entropy, (one - other).abs().mean()

    def lower(loss: Tensor, *sgds: SGD) -> None:
        literal.zero_grad()
        torch.autograd.backward(loss)
        for sgd in sgds:
            sgd.step()

    for progress in (0.25, 0.75):
        step(batch, progress)
        for sgd in (generator, heads):
            sgd.param_groups[0]["lr"] = 0.1 * (1 + 10 * progress) ** -0.75
        lower(losses()[0], generator, heads)
        entropy, apart = losses()
        lower(entropy - 30 * apart, heads)
        for _ in range(3):
            entropy, apart = losses()
            lower(entropy + 30 * apart, generator)
    for a, b in zip(values(ours), values(literal), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_sum_of_the_wrapper_trains_like_the_plain_sum(
    task: Task, method: str
) -> None:
    config = Config(task.name, method, "sum", seed=0, steps=4, batch_size=8)
    trained = []
    looking = partial(
        looking_at_unrelated,
        make_update=partial(harmonized, rule="sum"),
        null=[],
        every=2,
    )
    for make_update in (plain_update, looking):
        networks = build_networks(method, seed=0)
        step = make_step(config, networks, make_update)
        for done, batch in enumerate(batches(task, 8, 4, seed=0)):
            step(batch, done / 4)
        trained.append(values(networks))
    for one, two in zip(*trained, strict=True):
        torch.testing.assert_close(one, two)


def test_the_recorded_gramian_is_that_of_the_gradients_over_the_generator(
    batch: Batch,
) -> None:
    networks = build_networks("DANN", seed=0)
    losses = dann_losses(networks, batch, 1.0, 1.0)
    rows = [
        torch.cat([g.flatten() for g in gradients(loss, networks.generator)])
        for loss in losses
    ]
    jacobian = torch.stack(rows).double()
    recorder = Recorder()
    sgd = SGD(networks.parameters(), lr=0.1)
    shared = networks.generator.parameters()
    harmonized(sgd, shared, rule="gh", recorder=recorder)(losses)
    (gramian,) = recorder.flush().gramians
    torch.testing.assert_close(gramian, jacobian @ jacobian.T)


def test_heads_and_discriminator_get_the_plain_sum_under_every_rule(
    batch: Batch,
) -> None:
    trained: dict[str, Networks] = {}
    for rule in RULES:
        networks = build_networks("DANN", seed=0)
        losses = dann_losses(networks, batch, 1.0, 1.0)
        # Opposed, so that the rules have something to do.
        opposed = Losses(
            losses.alignment - losses.classification, losses.classification
        )
        sgd = SGD(networks.parameters(), lr=0.1)
        shared = networks.generator.parameters()
        harmonized(sgd, shared, rule=rule)(opposed)
        trained[rule] = networks
    for rule in ("gh", "ghpp", "ghpp_printed"):
        for part in ("heads", "discriminator"):
            expected = getattr(trained["sum"], part).parameters()
            for a, b in zip(
                getattr(trained[rule], part).parameters(), expected, strict=True
            ):
                torch.testing.assert_close(a, b)
        generator = values(trained["sum"].generator)
        assert not same(generator, values(trained[rule].generator))


def test_unrelated_gradients_keep_their_norms_and_are_obtuse_half_of_the_time(
    batch: Batch,
) -> None:
    networks = build_networks("DANN", seed=0).eval()
    losses = dann_losses(networks, batch, 1.0, 1.0)
    shared = list(networks.generator.parameters())
    generator = torch.Generator().manual_seed(0)
    rows = unrelated_gramians(losses, shared, generator, draws=2000)
    first, second = (
        sum(
            float(g.double().square().sum())
            for g in gradients(loss, networks.generator)
        )
        for loss in losses
    )
    assert len({(row[0], row[2]) for row in rows}) == 1
    assert rows[0][0] == pytest.approx(first, rel=1e-5)
    assert rows[0][2] == pytest.approx(second, rel=1e-5)
    obtuse = sum(row[1] < 0 for row in rows) / len(rows)
    assert abs(obtuse - 0.5) < 0.05
    # A sign for each row, neither for each number nor one for all.
    spread = sum(row[1] ** 2 for row in rows) / len(rows)
    products = [
        (a * b).double()
        for a, b in zip(
            *(gradients(loss, networks.generator) for loss in losses), strict=True
        )
    ]
    by_row = sum(
        float(one.reshape(len(one), -1).sum(1).square().sum()) for one in products
    )
    assert spread == pytest.approx(by_row, rel=0.15)
    by_number = sum(float(one.square().sum()) for one in products)
    for other in (by_number, sum(float(one.sum()) for one in products) ** 2):
        assert not 0.5 < other / by_row < 2
    assert all(parameter.grad is None for parameter in shared)


def test_rules_are_those_of_the_library_by_name() -> None:
    for name in ("gh", "ghpp", "ghpp_printed", "ghpp_balanced"):
        rule = find_rule(name)
        assert rule.weighting is getattr(ghopt, name)
        assert rule.coefficients is getattr(ghopt, f"{name}_coefficients")


@pytest.mark.parametrize("name", sorted({*ALL_RULES, *LAMBDAS.values()}))
def test_a_rule_s_weights_are_the_sums_of_its_coefficients(name: str) -> None:
    gramian = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    rule = find_rule(name)
    weights = rule.coefficients(gramian).sum(0)
    torch.testing.assert_close(rule.weighting(gramian), weights)


def test_a_changed_sign_is_that_of_the_task_in_its_name() -> None:
    gramian = torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
    for name, weights in (
        ("sum", [1, 1]),
        ("minus_alignment", [-1, 1]),
        ("minus_classification", [1, -1]),
    ):
        assert find_rule(name).weighting(gramian).tolist() == weights


def test_harmonized_gramians_are_what_each_rule_promises() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        jacobian = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        gramian = jacobian @ jacobian.T
        after = {rule: harmonized_gramian(rule, gramian) for rule in RULES}
        cosine = _cosine(gramian)
        assert after["sum"].equal(gramian)
        if cosine >= 0:
            assert all(one.equal(gramian) for one in after.values())
            continue
        assert _cosine(after["gh"]) > 0
        assert abs(_cosine(after["ghpp"])) < 1e-12
        assert _cosine(after["ghpp_printed"]) == pytest.approx(cosine)


def _cosine(gramian: Tensor) -> float:
    return float(gramian[0, 1] / (gramian[0, 0] * gramian[1, 1]).sqrt())


def test_networks_of_a_seed_are_the_same_and_of_another_are_not() -> None:
    for method in METHODS:
        one = build_networks(method, seed=3)
        assert same(values(one), values(build_networks(method, seed=3)))
        assert not same(values(one), values(build_networks(method, seed=4)))


def test_all_methods_of_a_seed_start_from_the_same_generator() -> None:
    first = values(build_networks(METHODS[0], seed=3).generator)
    for method in METHODS:
        assert same(first, values(build_networks(method, seed=3).generator))


def test_the_small_lenet_has_the_documented_size() -> None:
    networks = build_networks("MCD", seed=0)
    assert sum(p.numel() for p in networks.generator.parameters()) == 29760
    probabilities = networks.eval()(torch.zeros(3, 1, 16, 16))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_a_run_s_steps_are_told_its_progress_from_0_to_1(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    def make(*_: object) -> Step:
        return lambda _batch, progress: told.append(progress)

    monkeypatch.setattr(train, "make_step", make)
    train.run(Config(task.name, "DANN", "sum", seed=0, steps=4, batch_size=8), task)
    assert told == [0, 0.25, 0.5, 0.75]


def test_the_learning_rate_follows_its_schedule(task: Task, batch: Batch) -> None:
    config = Config(task.name, "DANN", "sum", seed=0, steps=10)
    rates = []

    def make_update(sgd: SGD, _shared: Iterable[nn.Parameter]) -> Update:
        return lambda _losses: rates.append(sgd.param_groups[0]["lr"])

    step = make_step(config, build_networks("DANN", 0), make_update)
    for progress in (0.0, 0.5):
        step(batch, progress)
    assert rates == pytest.approx([0.02, 0.02 * 6**-0.75])
