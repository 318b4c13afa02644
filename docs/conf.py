"""How Sphinx makes the pages, one of each recipe among them: `sphinx-build -W docs OUT`."""

import ast
import tempfile
import zlib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "ghopt"
copyright = "the ghopt authors"
extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Formulas between dollars, and links to headings.
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
# Notebooks run when the pages are built; one that fails, or warns, fails the build.
nb_execution_mode = "force"
# For each cell. The first imports torch, and that alone may take longer than the default of
# 30 s where the disk is cold and the cores are busy.
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove-warn"
# Pictures of the gallery: drawn by the code beside them.
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
html_theme = "furo"
html_title = "ghopt"
# Wide tables scroll by themselves, not the page.
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
# Signatures are for reading: types as written, not as resolved, and no module names.
autodoc_typehints = "signature"
autodoc_type_aliases = {"Losses": "Losses", "Weighting": "Weighting"}
autodoc_member_order = "bysource"
add_module_names = False
# A default that is a function has no address in it.
autodoc_preserve_defaults = True
napoleon_use_ivar = True
# Docstrings of recipes set code in single backticks.
default_role = "code"
# Formulas as MathML, which browsers show by themselves: MathJax would come over the network.
html_math_renderer = "mathml"
# Names of Python and torch are links to their pages. Without a network they are words: an
# inventory that holds nothing stands in, or Sphinx would warn.
_nothing = Path(tempfile.mkdtemp(), "objects.inv")
_nothing.write_bytes(
    b"# Sphinx inventory version 2\n# Project: nothing\n# Version: 0\n"
    b"# The remainder of this file is compressed using zlib.\n" + zlib.compress(b"")
)
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, str(_nothing))),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, str(_nothing))),
}
intersphinx_timeout = 5


def write_recipes(app: Sphinx) -> None:
    """Make a page of each script in examples/: its docstring, and the code below it."""
    pages = Path(app.srcdir, "recipes")
    pages.mkdir(exist_ok=True)
    for page in pages.glob("*.rst"):
        page.unlink()
    for script in Path(app.srcdir).parent.glob("examples/[!_]*.py"):
        module = ast.parse(script.read_text(encoding="utf-8"))
        title, _, prose = (ast.get_docstring(module) or "").partition("\n")
        code = (
            f".. literalinclude:: ../../examples/{script.name}\n"
            f"   :lines: {(module.body[0].end_lineno or 0) + 2}-\n"
        )
        title = title.rstrip(".")
        page = pages / f"{script.stem}.rst"
        page.write_text(
            f"{title}\n{'=' * len(title)}\n{prose}\n\n{code}", encoding="utf-8"
        )


def write_formula(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, and nothing else of its node."""
    is_block = isinstance(node, nodes.math_block)
    writer.body.append(str(tex2mathml(node.astext(), as_block=is_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Call `write_recipes` before Sphinx looks for pages, and make the form of formulas known."""
    app.connect("builder-inited", write_recipes)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
