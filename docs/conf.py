"""How the site is built: `make docs`, or

    sphinx-build -W --keep-going -n -c docs . docs/_build/html

The source is the whole checkout, so that the pages of `experiments/` are on the site as they stand, and so
that a link to a file is the same here and where the repository is looked at. Nothing is fetched while it is
built, nor by a page that is opened: no fonts, no scripts of others, search and formulas included.
"""

import sys
from pathlib import Path

from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import gaccum_exp  # noqa: E402  # from this checkout

project = "gaccum_exp"
author = "the authors of gaccum_exp"
version = release = gaccum_exp.__version__
html_title = f"gaccum_exp {release}"
language = "en"
nitpicky = True

root_doc = "docs/index"
include_patterns = ["docs/**", "experiments/*/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    *("docs/_build", "docs/template", "**/__pycache__", ".*", "outputs", "multirun", "mlruns", "conf"),
    *("gaccum_exp", "tests"),
]

extensions = [
    "myst_nb",
    "reference",  # docs/_ext
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests/docs executes the notebook
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

default_role = "literal"  # docstrings write `code` with one sign
autodoc_mock_imports = [
    "lightning",
    "peft",
    "timm",
    "transformers",
]  # seconds each, for their names alone
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # a docstring says what an argument is
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [("py:.*", r"(?!gaccum_exp\.).*")]  # other projects' names: nothing is fetched

html_theme = "furo"
html_static_path = ["_static"]
html_extra_path = ["_root"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}


def inline_math(translator: HTML5Translator, node: object) -> None:
    """Write a formula as MathML, which browsers draw by themselves."""
    _math(translator, node, display=False)


def display_math(translator: HTML5Translator, node: object) -> None:
    """Write a formula on lines of its own."""
    _math(translator, node, display=True)


def _math(translator: HTML5Translator, node: object, *, display: bool) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(tex2mathml(node.astext(), as_block=display))  # type: ignore[attr-defined]
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Register how formulas are written."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
