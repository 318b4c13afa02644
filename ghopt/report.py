"""A recording as one page to read: ``python -m ghopt.report run.jsonl``.

Needs matplotlib, extra ``[plot]``. The page holds all it shows, and no script.
"""

import argparse
import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from ghopt.certainty import Share, share_below
from ghopt.geometry import plain_sum
from ghopt.plots import new_figure, plots_of
from ghopt.recording import Recording

FEWEST_STEPS = 100
"""Of fewer steps nothing is concluded."""

STEADY = 30.0
"""Independent steps from which on a recording speaks for more than itself."""

RARELY, OFTEN = 0.05, 0.2
"""Shares of the steps below which something is rare, and above which it is frequent."""

RIGHT = 0.05
"""Below this median cosine gradients are at right angles, for what it matters."""

UNEVEN = 10.0
"""Ratio of norms from which on the sum is for the longer gradient alone."""

OPPOSED_BY_DESIGN = -0.6
"""Median cosine below which two tasks want the opposite, if they nearly always do.

Opposite gradients of a whole data set are 180 degrees apart, -1. The noise of batches, and
parameters that only one of the tasks reaches, leave -0.7 to -0.9 of that in a VAE.
"""

OPPOSED = -1e-6
"""Cosines below this are no rounding: as in :meth:`ghopt.Recording.opposed`."""

_MOST_ROWS = 30
# What no recording can tell for certain.
_BUT = (
    "But leave losses alone that are opposed by design, as a loss and its penalty: a "
    "weighting would change what you trade."
)


@dataclass(frozen=True)
class Pair:
    """Two tasks over a recording.

    Attributes:
        names: of the tasks; the one whose gradients are longer comes first.
        share: of the steps with both in which they are in conflict.
        cosine: median of these cosines, 0 if they never are.
        ratio: median of the ratio of the norms, at least 1.
        independent: as many independent steps would say as much.
    """

    names: tuple[str, str]
    share: float
    cosine: float
    ratio: float
    independent: float


@dataclass(frozen=True)
class Verdict:
    """What a recording says.

    Attributes:
        findings: sentences about how often, how strong, which tasks, which layers.
        advice: whether to weigh the tasks, to scale the losses or to leave them alone.
    """

    findings: list[str]
    advice: list[str]

    def __str__(self) -> str:
        """Give all sentences, one a line."""
        return "\n".join([*self.findings, *self.advice])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m ghopt.report", description=__doc__)
    parser.add_argument(
        "file", type=Path, help="a recording, as written by Recording.to_jsonl"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PAGE", help="(default: the file's name with .html)"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.file.with_suffix(".html")
    try:
        if out.resolve() == options.file.resolve():
            raise ValueError(f"--out must not be the recording itself, got {out}")
        recording = Recording.from_jsonl(options.file)
        page = make_page(recording, options.file.name)
        out.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{judge(recording)}\nWritten to {out}.")


class Page(str):
    """A page of HTML, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        # A frame of its own: its styles would be those of the notebook.
        return (
            f'<iframe srcdoc="{escape(self)}" style="width: 100%; height: 40rem; '
            'border: 0"></iframe>'
        )


def make_page(recording: Recording, title: str) -> Page:
    """Make the page: a string, which notebooks show.

    Raises:
        ImportError: if matplotlib is missing; names the extra that installs it.
        ValueError: if nothing was recorded.
    """
    plots = [
        f'<figure><figcaption>{escape(name)}</figcaption><img alt="{escape(name)}" '
        f'src="data:image/svg+xml;base64,{image}"></figure>'
        for name, image in _images(_finite(recording))
    ]
    verdict = judge(recording)
    paragraphs = [f"<li>{escape(text)}</li>" for text in verdict.findings]
    advice = [f"<p>{escape(text)}</p>" for text in verdict.advice]
    page = _PAGE.format(
        title=escape(title),
        findings="\n".join(paragraphs),
        advice="\n".join(advice),
        table=_table(pairs_of(_finite(recording))),
        plots="\n".join(plots),
    )
    return Page(page)


def judge(recording: Recording) -> Verdict:
    """Say in plain words what a recording shows, and what to do about it.

    Raises:
        ValueError: if nothing was recorded.
    """
    if not len(recording):
        raise ValueError(
            "recording must have a step, got none: attach the recorder before the "
            "training, and flush it once; a second flush finds nothing"
        )
    finite = _finite(recording)
    lost = len(recording) - len(finite)
    left_out = [f"{lost} steps that were not finite are left out."] if lost else []
    if not len(finite):
        return Verdict(left_out, ["No step was finite: see to that before all else."])
    verdict = _judge_finite(finite)
    return Verdict([*left_out, *verdict.findings], verdict.advice)


def _judge_finite(recording: Recording) -> Verdict:
    pairs = pairs_of(recording)
    count = len(recording)
    if len(recording.names) == 1:
        return Verdict(
            [f"{count} steps of a single task were recorded."],
            ["A single task is in conflict with nothing."],
        )
    if not pairs:
        return Verdict(
            [f"{count} steps were recorded, no two tasks in the same one."],
            ["Tasks that never meet in a step are in conflict with nothing."],
        )
    conflict = share_below(_lowest(recording.cosines.flatten(1)))
    ones = torch.ones_like(recording.weights)
    opposed = share_below(_lowest(recording.update_cosines(ones)), OPPOSED)
    against = _mean(recording.opposed(recording.weights).any(1))
    findings = [
        *_about_features(recording),
        (
            f"In {_percent(conflict.share)} of the {count} recorded steps two tasks were "
            "in conflict: their gradients formed an obtuse angle."
        ),
        (
            f"In {_percent(opposed.share)} of the steps the plain sum of the gradients "
            "works against a task; weighted as recorded it does in "
            f"{_percent(against)}."
        ),
        *_about_certainty(count, opposed),
        *_about_steps(recording),
        *_about_pairs(pairs),
        *_about_layers(recording),
        *_about_silent_tasks(recording),
    ]
    if count < FEWEST_STEPS:
        short = (
            f"Too short to tell: {count} steps. Record {FEWEST_STEPS} or more, a whole "
            "training if possible."
        )
        return Verdict(findings, [short])
    advice = [*_about_trade_offs(pairs)] or [
        *_about_open_cases(pairs),
        *_advice_on_lengths(pairs),
        _advice(recording, pairs, conflict, opposed),
    ]
    return Verdict(findings, [*advice, *_advice_on_steps(recording)])


def _about_features(recording: Recording) -> Iterator[str]:
    measured = int(recording.at_features.sum())
    if measured:
        which = "All" if measured == len(recording) else f"{measured} of the"
        yield (
            f"{which} {len(recording)} recorded steps were measured at the features "
            "(features=): what follows is said of the gradients there. On the parameters "
            "the update may oppose tasks all the same; measure() on them tells."
        )


def _about_certainty(count: int, opposed: Share) -> Iterator[str]:
    if count >= FEWEST_STEPS:
        yield (
            "How sure the share of the sum is: successive steps are alike, so that for it "
            f"{count} count as {opposed.independent:.0f}. In longer recordings of the same "
            f"the sum works against a task in {_between(opposed)}."
        )
        if abs(opposed.last - opposed.first) >= OFTEN:
            yield (
                f"It changed: the sum worked against a task in {_percent(opposed.first)} "
                f"of the first half of the steps, in {_percent(opposed.last)} of the "
                "second."
            )


def _about_steps(recording: Recording) -> Iterator[str]:
    seen = recording.where(recording.has_steps)
    if len(seen):
        against = _mean(seen.step_opposed.any(1))
        yield (
            f"What the optimizer made of it, the step taken, worked against a task in "
            f"{_percent(against)} of {len(seen)} steps."
        )


def _about_trade_offs(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        strong = _is_always_opposed(pair) and pair.cosine < OPPOSED_BY_DESIGN
        if strong and pair.independent >= STEADY:
            one, other = pair.names
            yield (
                f"A trade-off, not a conflict: {_both(pair)} want the opposite in "
                f"{_percent(pair.share)} of their steps, strongly (median cosine "
                f"{pair.cosine:.2f}) and steadily, as a loss and its penalty do, or the "
                "reconstruction and the KL term of a VAE. A weighting would change what "
                "you trade: leave them as they are, in one loss, or protect one: "
                f'protect=("{one}",) or ("{other}",).'
            )


def _about_open_cases(pairs: Sequence[Pair]) -> Iterator[str]:
    """Ask where a conflict may be a trade-off, and the recording does not tell."""
    for pair in pairs:
        if _is_always_opposed(pair) and pair.independent < STEADY:
            yield (
                f"A trade-off, or a conflict? {_both(pair)} want the opposite in "
                f"{_percent(pair.share)} of their steps, but change too steadily to tell "
                "whether that lasts. If they are opposed by design, as a loss and its "
                "penalty are, leave them as they are, in one loss. If not:"
            )


def _is_always_opposed(pair: Pair) -> bool:
    return pair.share > 1 - RARELY and pair.cosine < -RIGHT


def _about_pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    worst = max(pairs, key=lambda pair: pair.share)
    if worst.share:
        yield (
            f"Most often in conflict are {_both(worst)}: in {_percent(worst.share)} of "
            f"their steps, then with a median cosine of {worst.cosine:.2f}."
        )


def _about_layers(recording: Recording) -> Iterator[str]:
    shares = recording.layer_shares
    if len(shares) > 1 and len(set(shares.values())) == 1:
        (share,) = set(shares.values())
        yield f"No layer stands out: each has a pair in conflict in {_percent(share)}."
        return
    name, most = max(shares.items(), key=lambda one: one[1], default=("", 0.0))
    if most:
        yield (
            f"Among the layers, {_layer(name)} has a pair in conflict most often, in "
            f"{_percent(most)} of the steps."
        )
    name, least = min(shares.items(), key=lambda one: one[1], default=("", 0.0))
    if least < most:
        yield f"Least often {_layer(name)}: {_percent(least)}."


def _about_silent_tasks(recording: Recording) -> Iterator[str]:
    silent = [
        name
        for name, norms in zip(recording.names, recording.norms.T, strict=True)
        if not norms.nan_to_num(0).any()
    ]
    if silent:
        yield (
            f"Without any gradient: {', '.join(silent)}. Does the loss reach the "
            "parameters?"
        )


def pairs_of(recording: Recording) -> list[Pair]:
    """Summarize each pair of tasks that had part in a step together, the worst first."""
    found = []
    cosines, norms = recording.cosines, recording.norms
    for (i, j), share in recording.conflict_shares.items():
        values = cosines[:, i, j]
        ratios = norms[:, i] / norms[:, j]
        ratios = ratios[ratios.isfinite() & (ratios > 0)]
        if values.isnan().all():
            continue
        ratio = float(ratios.log().median().exp()) if len(ratios) else 1.0
        first, second = recording.names[i], recording.names[j]
        obtuse = values[values < 0]
        found.append(
            Pair(
                (first, second) if ratio >= 1 else (second, first),
                share,
                float(obtuse.median()) if len(obtuse) else 0.0,
                max(ratio, 1 / ratio),
                share_below(values).independent,
            )
        )
    return sorted(found, key=lambda pair: -pair.share)


def _advice(
    recording: Recording, pairs: Sequence[Pair], conflict: Share, opposed: Share
) -> str:
    if conflict.share < RARELY and (conflict.far or conflict.high < OFTEN):
        return (
            "The tasks agree. A weighting would leave almost every step as it is; there "
            "is nothing to gain from one here."
        )
    if not _is_told(conflict, opposed):
        fewer = min(conflict, opposed, key=lambda share: share.independent)
        of_what = "conflict" if fewer is conflict else "the sum"
        return (
            "Too short to tell, or too uneven: the angles between the tasks are so alike "
            "from step to step, or change so steadily, that for the share of "
            f"{of_what} {len(recording)} steps count as {fewer.independent:.0f}. Record "
            "longer, a whole training if possible; of a whole one the plots say more than "
            "a share."
        )
    if opposed.share < RARELY:
        return _advice_where_the_sum_serves_all(pairs)
    if rule := _rule_of(recording):
        return (
            f'Recorded was a training with "{rule}", which met a sum that works against a '
            f"task in {_between(opposed)}. Whether that helps, only the same training "
            "with plain_sum can tell, at a few loss weights and over several seeds."
        )
    if opposed.share >= OFTEN:
        return (
            "A weighting is worth trying: the plain sum often works against a task, in "
            f"{_between(opposed)}. Begin with ghopt.gh, which never opposes one, and "
            f"compare over several seeds. {_BUT}"
        )
    return (
        "A weighting may help: the plain sum works against a task now and then, in "
        f"{_between(opposed)}. Compare ghopt.gh with the sum over several seeds before "
        f"you believe it. {_BUT}"
    )


def _is_told(conflict: Share, opposed: Share) -> bool:
    """Say whether more steps could hardly bring the opposite advice.

    That there is nothing to gain ends the matter, and must be seen in a recording that is
    steady. That something is worth trying is tried next.
    """
    if opposed.low < RARELY and opposed.high >= OFTEN:
        return False
    steady = min(conflict.independent, opposed.independent) >= STEADY
    return steady or opposed.share >= RARELY


def _advice_where_the_sum_serves_all(pairs: Sequence[Pair]) -> str:
    strongest = min(pair.cosine for pair in pairs)
    if strongest > -RIGHT:
        return (
            f"The conflicts are weak: even the strongest pair is near a right angle "
            f"(median cosine {strongest:.2f}). Gradients of unrelated tasks look like "
            "that, obtuse half of the time by nature. A weighting will change little."
        )
    return (
        "Tasks are in conflict, but their sum seldom works against one: what a "
        "weighting changes is how fast each of them goes. Expect little."
    )


def _advice_on_lengths(pairs: Sequence[Pair]) -> Iterator[str]:
    uneven = max(pairs, key=lambda pair: pair.ratio)
    if uneven.ratio >= UNEVEN:
        one, other = uneven.names
        yield (
            f'Scale the losses first: the gradients of "{one}" are typically '
            f'{uneven.ratio:.0f} times as long as those of "{other}", so their sum is '
            f'for "{one}" almost alone. Try a smaller factor on the loss of "{one}", or '
            f'a larger one on that of "{other}", and record again.'
        )


def _advice_on_steps(recording: Recording) -> Iterator[str]:
    seen = recording.where(recording.has_steps)
    if len(seen) < FEWEST_STEPS:
        return
    gradient = _mean(seen.opposed(seen.weights).any(1))
    step = _mean(seen.step_opposed.any(1))
    if step >= max(OFTEN, 2 * gradient):
        yield (
            "The steps oppose tasks far more often than the gradients do: momentum carries "
            "old directions on. Try HarmonizedOptimizer(..., project_step=True), which "
            "leaves no step that opposes a task, and compare over several seeds."
        )


def _rule_of(recording: Recording) -> str:
    """Name the rule that most steps were weighed by; "" for the sum, or if unknown."""
    rule, _ = Counter(recording.rules).most_common(1)[0]
    weighed = bool((recording.weights.nan_to_num(1) != 1).any())
    return rule if weighed and rule != plain_sum.__name__ else ""


def _finite(recording: Recording) -> Recording:
    return recording.where(recording.finite)


def _percent(share: float) -> str:
    return "less than 1%" if 0 < share < 0.005 else f"{share:.0%}"


def _between(found: Share) -> str:
    low, high = _percent(found.low), _percent(found.high)
    return f"{low} to {high} of the steps (95 % sure)"


def _lowest(cosines: Tensor) -> Tensor:
    """Take the lowest cosine of each step, ``[n, m]`` to ``[n]``; NaN if there is none."""
    lowest = cosines.nan_to_num(torch.inf).amin(1)
    return lowest.masked_fill(lowest.isinf(), torch.nan)


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _both(pair: Pair) -> str:
    one, other = pair.names
    return f'"{one}" and "{other}"'


def _layer(name: str) -> str:
    return f'"{name}"' if name else "the model's own parameters"


def _images(recording: Recording) -> Iterator[tuple[str, str]]:
    """Draw each plot as SVG, in base64: the same recording gives the same bytes."""
    for title, plot in (plots_of(recording) if len(recording) else {}).items():
        figure = new_figure(4.8, 3.4)
        from matplotlib import rc_context  # not before: new_figure says what to install

        plot(recording, figure.subplots())
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": "ghopt"}):  # or parts have random names
            figure.savefig(file, format="svg", metadata={"Date": None})
        yield title, base64.b64encode(file.getvalue()).decode()


def _table(pairs: Sequence[Pair]) -> str:
    rows = [
        "<tr>"
        f"<td>{escape(pair.names[0])}</td><td>{escape(pair.names[1])}</td>"
        f"<td>{_percent(pair.share)}</td><td>{pair.cosine:.2f}</td>"
        f"<td>{pair.ratio:.3g}</td>"
        "</tr>"
        for pair in pairs[:_MOST_ROWS]
    ]
    more = len(pairs) - len(rows)
    note = f"<p>{more} more pairs are less often in conflict.</p>" if more > 0 else ""
    return f"<div><table>{_HEAD}<tbody>{''.join(rows)}</tbody></table></div>{note}"


_HEAD = (
    "<thead><tr><th>longer</th><th>shorter</th><th>conflict</th><th>cosine</th>"
    "<th>ratio</th></tr></thead>"
)

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Conflict of tasks: {title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 64rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.advice {{ border-left: .3rem solid #1f77b4; padding: .1rem 1rem; background: #f2f7fb; }}
.plots {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; }}
img {{ width: 100%; height: auto; }}
div:has(> table) {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .95rem; }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd;
  overflow-wrap: normal; }}
td:nth-child(n+3), th:nth-child(n+3) {{ text-align: right; }}
</style>
</head>
<body>
<h1>Conflict of tasks: {title}</h1>
<div class="advice">
{advice}
</div>
<ul>
{findings}
</ul>
<h2>Pairs of tasks</h2>
<p>The task with the longer gradients and the one with the shorter; the share of their
steps in which they are in conflict, the median cosine of these steps, and the median
ratio of the norms of all.</p>
{table}
<h2>Plots</h2>
<div class="plots">
{plots}
</div>
</body>
</html>
"""

if __name__ == "__main__":
    main()
