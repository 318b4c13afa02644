"""The default tests beside every torch and Python that the README names, and as on others.

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

# Other orders of summation: those of other processors, and of more threads.
PROCESSORS = {
    "plainest": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "OMP_NUM_THREADS": "1",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "OMP_NUM_THREADS": "2",
    },
}


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


@nox.session
@nox.parametrize("processor", [nox.param(name, id=name) for name in PROCESSORS])
def processors(session: nox.Session, processor: str) -> None:
    """Run the tests with the arithmetic of another processor."""
    session.chdir(ROOT)
    session.install("torch==2.13.0", ".[test]")
    session.run(
        *("python", "-m", "pytest", *session.posargs), env=PROCESSORS[processor]
    )
