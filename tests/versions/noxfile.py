"""The default tests beside every torch and every Python that the README names.

``nox -f tests/versions/noxfile.py`` makes an environment for each, and runs all of them;
``-l`` lists them, ``-s "tests(torch-2.8.0)"`` takes one, and what follows ``--`` goes to
pytest. But for a CPU build on your index, torch for Linux brings gigabytes of CUDA.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).parents[2]

NEWEST = "2.15.0"
# With what their triton needs to interpret the kernels.
TORCHES = {"2.8.0": ["numpy<2.4"], "2.10.0": ["numpy<2.4"], "2.13.0": [], NEWEST: []}
PYTHONS = ["3.12", "3.13", "3.14"]

VERSIONS = [
    *(nox.param("3.11", torch, id=f"torch-{torch}") for torch in TORCHES),
    *(nox.param(python, NEWEST, id=f"python-{python}") for python in PYTHONS),
]


@nox.session
@nox.parametrize(["python", "torch"], VERSIONS)
def tests(session: nox.Session, torch: str) -> None:
    """Install ghopt beside one torch, and run its tests."""
    session.chdir(ROOT)
    session.install(f"torch=={torch}", ".[test]", *TORCHES[torch])
    session.run(
        *("python", "-m", "pytest", *session.posargs),
        env={"OMP_NUM_THREADS": "1"},
    )
