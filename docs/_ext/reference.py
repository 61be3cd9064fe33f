"""The parts of the reference that are made from the code: a directive that renders their Markdown.

```{generated} keys
```
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from omegaconf import DictConfig, OmegaConf
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

import gaccum_exp
from gaccum_exp.arms import outcome
from gaccum_exp.audit import result
from gaccum_exp.config import schema
from gaccum_exp.config.files import conf_dir, options
from gaccum_exp.config.keys import Key, attribute_docs, keys, of_block, opening_of
from gaccum_exp.report.compare import columns
from gaccum_exp.tracking import metrics

OPEN_BLOCKS = ("model", "data", "criterion", "optimizer", "scheduler", "strategy")

PATTERNS = {
    f"{metrics.TRAIN_LOSS}/<term>": "Of a loss with terms: each by itself.",
    f"{metrics.EVAL_LOSS}/<term>": "The same of evaluations.",
    metrics.memory_part("<part>"): "At the peak: parameters, gradients, optimizer_state, activations, "
    "temporaries and inputs.",
    metrics.memory_part("allocator_<counter>"): "On CUDA: requested (what tensors asked for), allocated "
    "(that in whole blocks), reserved (what was taken from the device).",
    metrics.in_adam_metric("noise/<…>"): "The same in the metric of an Adam-like optimizer.",
    metrics.planned("<…>"): "Under `task=plan`, N in place of the step: `peak_bytes` and its parts.",
}
"""Metrics of which there are several, and what they are."""

BATCH_COLUMNS = {
    "setting": "Reduction, and what was swept besides batch, rate and seed.",
    "global_batch_size": "Samples of one optimizer step.",
    "accum_steps": "N, micro-batches per window.",
    "micro_batch_size": "Samples of the largest.",
    "rate": "`optimizer.lr`, of those tried the one with the lowest loss at equal samples.",
    "rate_place": "Its place among those tried: `inside`, `highest`, `lowest`, `only one`, or "
    "`contested`: over the fewer seeds that both have, another is lower.",
    "step_s": "Seconds of an optimizer step, the median over seeds of their medians.",
    "rates_tried": "All of them, ascending.",
    "seeds": "Those that the losses are means of.",
    "diverged_seeds": "Those that diverged at this rate.",
    "equal_<axis>": "The point that all arms have reached; axes are `samples`, `steps` and `seconds`.",
    "<axis>_metric": "What is compared there: the evaluation's loss, or else the train loss.",
    "loss_at_equal_<axis>": "Its mean over seeds there.",
    "spread_at_equal_<axis>": "Its standard deviation over seeds.",
    "noise_scale": "In samples, at the end of the training, of the seed with the most measured windows.",
    "noise_scale_low": "The lower end of its 95 % interval.",
    "noise_scale_high": "The upper end; empty where nothing bounds it.",
    "noise_in_adam_metric": "Whether it is in the metric of an Adam-like optimizer.",
    "critical_batch": "The largest batch that is as good as the best at equal samples; all rows say it.",
    "critical_at_least": "Whether no larger one was tried.",
    "critical_open_because": "Why it is not resolved.",
    "loss_limit": "The loss up to which a batch is as good.",
}
"""The columns of batches.csv, in their order; a test holds them against a file."""

EXPORTED = tuple(f"gaccum_exp.{name}" for name in sorted(gaccum_exp.__all__))
ERRORS = tuple(name for name in EXPORTED if name.endswith("Error"))
CLASSES = tuple(name for name in EXPORTED if not name.islower() and name not in ERRORS)
API = {
    "Functions": tuple(name for name in EXPORTED if name.islower()),
    "What they return": (
        *CLASSES,
        "gaccum_exp.audit.watch.watch.Watched",
        "gaccum_exp.audit.result.Audit",
        "gaccum_exp.audit.result.Culprit",
        "gaccum_exp.audit.result.Check",
        "gaccum_exp.audit.result.ParameterError",
        "gaccum_exp.audit.audited_window.AuditedWindow",
        "gaccum_exp.core.window_loss.WindowLoss",
        "gaccum_exp.core.noise_scale.NoiseScale",
        "gaccum_exp.memory.plan.MemoryPlan",
        "gaccum_exp.memory.plan.Row",
    ),
    "Losses and strategies of your own": (
        "gaccum_exp.core.losses.protocol.LossFn",
        "gaccum_exp.core.losses.protocol.Term",
        "gaccum_exp.core.losses.protocol.at_least",
        "gaccum_exp.core.strategies.InPlace",
    ),
    "In other frameworks": (
        "gaccum_exp.integrations.lightning.AuditCallback",
        "gaccum_exp.integrations.transformers.AuditCallback",
        "gaccum_exp.integrations.due.BiasedAccumulationWarning",
        "gaccum_exp.integrations.pytest_plugin.audit_loop",
    ),
    "Errors": ERRORS,
}


def of_keys() -> str:
    """Return every key by block, with what it takes, its default and what it does."""
    parts = []
    known = [name for name in schema.Config.__dataclass_fields__ if name in schema.BLOCKS]
    for block in ["", "data", *known]:
        found = [key for key in keys().values() if key.name.rpartition(".")[0] == block]
        title, about = block or "The run as a whole", of_block(block) if block else ""
        parts.append(f"## {title}\n\n{about}\n\n{_key_table(found)}")
    return "\n\n".join(parts)


def of_tasks() -> str:
    """Return what `task` chooses from."""
    return _key_table([keys()["task"]])


def of_blocks() -> str:
    """Return the files of the open blocks: comment, text, and the arguments of what each names."""
    parts = []
    for block in OPEN_BLOCKS:
        parts.append(f"## {block}\n\n{of_block(block)}")
        parts += [_file(block, name) for name in options(block)]
    return "\n\n".join(parts)


def of_metrics() -> str:
    """Return every metric by its name in the store, with when it is recorded, and what it is."""
    docs = attribute_docs(metrics)
    named = {n: value for n, value in vars(metrics).items() if n.isupper() and isinstance(value, str)}
    rows = {value: docs[name] for name, value in named.items()} | PATTERNS
    groups = list(dict.fromkeys(name.partition("/")[0] for name in rows))
    ordered = sorted(
        rows, key=lambda name: groups.index(name.partition("/")[0])
    )  # within one as declared
    return _table(("metric", "when, and what"), ((_code(name), rows[name]) for name in ordered))


def of_columns() -> str:
    """Return the columns of comparison.csv in order, and how those that are printed are headed."""
    docs = attribute_docs(columns, "ComparisonRow")
    rows = (
        (_code(name), docs[name], " ".join(column.header.replace("{unit}", "").split()))
        for name, column in columns.COLUMNS.items()
        if column.in_csv
    )
    return _table(("column", "what it is", "in the table"), rows)


def of_batch_columns() -> str:
    """Return the columns of batches.csv in their order."""
    rows = ((_code(name), text) for name, text in BATCH_COLUMNS.items())
    return _table(("column", "what it is"), rows)


def of_causes() -> str:
    """Return every cause with the experiment that shows it."""
    docs = attribute_docs(result)
    names = {value: name for name, value in vars(result).items() if isinstance(value, str)}
    shown = {cause: docs[names[cause]].removeprefix("Shown by: ") for cause in result.CAUSES}
    return _table(("cause", "the experiment that shows it"), shown.items())


def of_exit_statuses() -> str:
    """Return the exit statuses, those of verdicts among them."""
    docs = attribute_docs(outcome)
    names = ("OK", "RUN_FAILED", "BAD_INPUT", "INTERRUPTED")
    rows = {getattr(outcome, name): docs[name] for name in names}
    for verdict, status in outcome.VERDICT_STATUS.items():
        rows[status] = f"The worst verdict is `{verdict}`."
    return _table(("status", "when"), ((str(status), rows[status]) for status in sorted(rows)))


def of_api() -> str:
    """Return what the package exports, what that returns, and the integrations."""
    parts = []
    for title, names in API.items():
        parts += [f"## {title}", *map(_documented, names)]
    return "\n\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "keys": of_keys,
    "tasks": of_tasks,
    "blocks": of_blocks,
    "metrics": of_metrics,
    "columns": of_columns,
    "batch_columns": of_batch_columns,
    "causes": of_causes,
    "exit_statuses": of_exit_statuses,
    "api": of_api,
}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a bar in a cell stays a bar, and a docstring is one line."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _code(text: str) -> str:
    return f"`{text}`"


def _key_table(found: Iterable[Key]) -> str:
    rows = ((_code(key.name), key.says, key.takes, _code(key.default)) for key in found)
    return _table(("key", "what it does", "takes", "default"), rows)


def _file(block: str, name: str) -> str:
    text = (Path(conf_dir()) / block / f"{name}.yaml").read_text(encoding="utf-8").strip()
    about = opening_of(block, name)
    config = OmegaConf.create(text)
    node = config.train if block == "data" else config
    assert isinstance(node, DictConfig)
    target = None if OmegaConf.is_missing(node, "_target_") else node.get("_target_")
    parts = [f"### {block}={name}", about, f"```yaml\n{text}\n```", _target(target) if target else ""]
    return "\n\n".join(part for part in parts if part)


def _target(target: str) -> str:
    """Describe what a `_target_` names: one of ours by its docstring, another by its arguments."""
    module, _, name = target.rpartition(".")
    if target.startswith("gaccum_exp."):
        kind = "autofunction" if name.islower() else "autoclass"
        return _eval_rst(f".. {kind}:: {target}\n   :no-index:")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    said = (f"{x.name}={x.default!r}" if x.default is not x.empty else x.name for x in parameters)
    return f"{_code(target)} takes {', '.join(map(_code, said))}."


def _documented(name: str) -> str:
    """Return autodoc's directive for a name: a class with its members, or a function."""
    if name.rpartition(".")[2][0].isupper():
        return _eval_rst(f".. autoclass:: {name}\n   :members:\n   :undoc-members:")
    return _eval_rst(f".. autofunction:: {name}")


def _eval_rst(text: str) -> str:
    """Return reStructuredText as a part of a Markdown page."""
    return f"```{{eval-rst}}\n{text}\n```"


class Generated(SphinxDirective):
    """Render one of `GENERATED` in place."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        self.env.note_reread()  # the code may have changed where the page has not
        return self.parse_text_to_nodes(GENERATED[self.arguments[0]](), allow_section_headings=True)


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read a docstring as plain text: an indented block is code, a star is a star."""
    lines[:] = [re.sub(r"(?<![\w`*\\])\*(?=\w)", r"\\*", line) for line in lines]
    for i in range(len(lines) - 1, 0, -1):
        before = next((line for line in reversed(lines[:i]) if line.strip()), "")
        opens = lines[i].strip() and not lines[i - 1].strip() and before
        if opens and _indent(lines[i]) >= _indent(before) + 4 and not re.match(r"\s*\w+:$", before):
            lines[i:i] = [f"{' ' * _indent(before)}::", ""]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, and how docstrings are read."""
    app.setup_extension("sphinx.ext.autodoc")
    # Of an attribute's first line napoleon takes what is before a colon for a type, and puts it last.
    GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
