"""How the site is built: by `make docs`, or

    sphinx-build -W --keep-going -n -c docs . docs/_build/html

The source is the whole checkout, so that the pages of `experiments/` are on the site as they stand, and
a link to a file is the same here and where the repository is looked at. Nothing is fetched while it is
built, nor by a page that is opened: no font, no script of others; search and formulas need no network.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils.nodes import Element, SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import gaccum_exp  # noqa: E402  # from this checkout


class Names(ModuleType):
    """A module that has any name as an empty class.

    To import these frameworks takes seconds, and of them the reference has no more than base classes.
    autodoc's own stand-ins hide the signatures of what derives from them.
    """

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for framework in ("lightning", "lightning.pytorch", "transformers"):
    sys.modules[framework] = Names(framework)

project = "gaccum_exp"
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
nb_execution_mode = "off"  # tests/docs runs the cells
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

default_role = "literal"  # docstrings write `code` with one sign
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
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_show_search_summary = False  # it is fetched page by page, which a browser refuses a file
html_search_scorer = str(HERE / "search_scorer.js")
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}


def setup(app: Sphinx) -> None:
    """Write formulas as MathML, which browsers draw by themselves, and name a page's language."""

    def written(translator: HTML5Translator, node: Element) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, math_block)))
        raise SkipNode

    app.add_html_math_renderer("mathml", (written, None), (written, None))

    def in_its_language(_: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
        if page.startswith("docs/zh/"):
            context["language"] = "zh-CN"

    app.connect("html-page-context", in_its_language)
