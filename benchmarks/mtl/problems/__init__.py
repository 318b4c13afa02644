"""The problems, one file each, and what only they need."""

from benchmarks.mtl.problems import (
    adversarial,
    cells,
    detection,
    multimnist,
    pinn,
    retrieval,
    vae,
)

PROBLEMS = {
    problem.name: problem
    for problem in (
        multimnist.PROBLEM,
        cells.PROBLEM,
        *detection.PROBLEMS,
        retrieval.PROBLEM,
        *adversarial.PROBLEMS,
        *pinn.PROBLEMS,
        vae.PROBLEM,
    )
}
"""By the names that the commands take."""
