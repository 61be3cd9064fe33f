"""The parts of the reference that are made from the code: a directive that renders their Markdown.

```{generated} keys
```
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from omegaconf import OmegaConf
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import gaccum_exp
from gaccum_exp.arms import outcome
from gaccum_exp.audit import result
from gaccum_exp.config import schema
from gaccum_exp.config.files import conf_dir, options
from gaccum_exp.config.keys import Key, attribute_docs, comment_of, keys, of_block
from gaccum_exp.report.compare import columns
from gaccum_exp.tracking import metrics

OPEN_BLOCKS = ("model", "data", "criterion", "optimizer", "scheduler", "strategy")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a bar in a cell stays a bar."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def code(text: str) -> str:
    """Return it as code, or as it is where it is empty."""
    return f"`{text}`" if text else text


def one_line(text: str) -> str:
    """Return a docstring on one line."""
    return " ".join(text.split())


def of_keys() -> str:
    """Return every key by block, with what it takes, its default and what it does."""
    parts = []
    named = [name for name in schema.Config.__dataclass_fields__ if name in schema.BLOCKS]
    for block in ["", "data", *named]:
        found = [key for key in keys().values() if key.name.rpartition(".")[0] == block]
        about = of_block(block) if block else "These stand in no block."
        parts.append(f"## {block or 'The run as a whole'}\n\n{about}\n\n{_key_table(found)}")
    return "\n\n".join(parts)


def _key_table(found: Iterable[Key]) -> str:
    rows = ((f"{code(k.name)}", k.takes, code(k.default), k.says) for k in found)
    return table(("key", "takes", "default", "what it does"), rows)


def of_tasks() -> str:
    """Return what `task` chooses from."""
    key = keys()["task"]
    return _key_table([key])


def of_blocks() -> str:
    """Return the files of the open blocks: comment, text, and the arguments of what each names."""
    parts = []
    for block in OPEN_BLOCKS:
        parts.append(f"## {block}\n\n{of_block(block)}")
        parts += [_file(block, name) for name in options(block)]
    return "\n\n".join(parts)


def _file(block: str, name: str) -> str:
    text = (Path(conf_dir()) / block / f"{name}.yaml").read_text(encoding="utf-8").strip()
    about = comment_of(block, name).partition("\n")[0].rstrip(":")
    parts = [f"### {block}={name}", about, f"```yaml\n{text}\n```"]
    config = OmegaConf.create(text)
    node = config.train if block == "data" else config
    target = None if OmegaConf.is_missing(node, "_target_") else node.get("_target_")
    if target:
        parts.append(_target(target))
    return "\n\n".join(part for part in parts if part)


def _target(target: str) -> str:
    """Describe what a `_target_` names: one of ours by its docstring, another by its arguments."""
    module, _, name = target.rpartition(".")
    if target.startswith("gaccum_exp."):
        kind = "autofunction" if name.islower() else "autoclass"
        return eval_rst(f".. {kind}:: {target}\n   :no-index:")
    found = getattr(importlib.import_module(module), name)
    arguments = [
        parameter.name
        if parameter.default is parameter.empty
        else f"{parameter.name}={parameter.default!r}"
        for parameter in inspect.signature(found).parameters.values()
    ]
    return f"{code(target)} takes {', '.join(map(code, arguments))}."


def of_metrics() -> str:
    """Return every metric by its name in the store, with when and what."""
    docs = attribute_docs(metrics)
    named = {
        name: value for name, value in vars(metrics).items() if isinstance(value, str) and "/" in value
    }
    rows = [
        (code(value), one_line(docs.get(name, ""))) for name, value in named.items() if name.isupper()
    ]
    rows += [
        (code(f"{of}/<term>"), "Of a loss with terms: the same of each.")
        for of in (metrics.TRAIN_LOSS, metrics.EVAL_LOSS)
    ]
    part, counter = metrics.memory_part("<part>"), metrics.memory_part("allocator_<counter>")
    rows += [
        (code(part), "At the peak: parameters, gradients, optimizer_state, activations, temporaries, inputs."),
        (code(counter), "On CUDA: requested (what tensors asked for), allocated (that in whole blocks), reserved "
         "(what was taken from the device)."),
        (code(metrics.in_adam_metric(metrics.NOISE_SCALE)), "And `noise/adam_trace`, … : the same in the metric "
         "of an Adam-like optimizer."),
        (code(metrics.planned("peak_bytes")), "Under `task=plan`, and its parts, with N in place of the step."),
    ]  # fmt: skip
    return table(("metric", "when, and what"), sorted(rows))


def of_columns() -> str:
    """Return the columns of comparison.csv in their order, with the heading of those that are printed."""
    docs = attribute_docs(columns, "ComparisonRow")
    rows = (
        (code(name), " ".join(column.header.replace("{unit}", "").split()), one_line(docs.get(name, "")))
        for name, column in columns.COLUMNS.items()
        if column.in_csv
    )
    return table(("column", "in the table", "what it is"), rows)


BATCH_COLUMNS = {
    "setting": "Reduction, and what was swept besides batch, rate and seed.",
    "global_batch_size": "Samples of one optimizer step.",
    "accum_steps": "N, micro-batches per window.",
    "micro_batch_size": "Samples of the largest.",
    "rate": "`optimizer.lr`, of those tried the one with the lowest loss at equal samples.",
    "rate_place": "Its place among those tried: `inside`, `highest`, `lowest`, `only one`, or `contested`: over the "
    "fewer seeds that both have, another is lower.",
    "step_s": "Seconds of an optimizer step, the median over seeds of their medians.",
    "rates_tried": "All of them, ascending.",
    "seeds": "Those that the losses are means of.",
    "diverged_seeds": "Those that diverged at this rate.",
    "equal_<axis>": "The point that all arms have reached: of `samples`, `steps` and `seconds`, as in the next three.",
    "<axis>_metric": "The loss that is compared there: the evaluation's, or the train loss where there is none.",
    "loss_at_equal_<axis>": "Its mean over seeds there.",
    "spread_at_equal_<axis>": "Its standard deviation over seeds.",
    "noise_scale": "In samples, at the end of the training, of the seed with the most measured windows.",
    "noise_scale_low": "The lower end of its 95 % interval.",
    "noise_scale_high": "The upper end; empty where nothing bounds it.",
    "noise_in_adam_metric": "Whether it is in the metric of an Adam-like optimizer.",
    "critical_batch": "The largest batch that is as good as the best at equal samples; the same in each row.",
    "critical_at_least": "Whether no larger one was tried.",
    "critical_open_because": "Why it is not resolved.",
    "loss_limit": "The loss up to which a batch is as good.",
}
"""The columns of batches.csv; tests/docs holds them against the file."""


def of_batch_columns() -> str:
    """Return the columns of batches.csv in their order."""
    return table(("column", "what it is"), ((code(name), text) for name, text in BATCH_COLUMNS.items()))


def of_causes() -> str:
    """Return every cause with the experiment that shows it."""
    docs = attribute_docs(result)
    named = {
        value: name for name, value in vars(result).items() if isinstance(value, str) and name.isupper()
    }
    rows = (
        (cause, one_line(docs.get(named[cause], "")).removeprefix("Shown by: ").removesuffix("."))
        for cause in result.CAUSES
    )
    return table(("cause", "the experiment that shows it"), rows)


def of_exit_statuses() -> str:
    """Return the exit statuses, those of verdicts among them."""
    docs = attribute_docs(outcome)
    named = {getattr(outcome, name): name for name in ("OK", "RUN_FAILED", "BAD_INPUT", "INTERRUPTED")}
    rows = {status: one_line(docs[name]) for status, name in named.items()}
    rows |= {
        status: f"The worst verdict is `{verdict}`."
        for verdict, status in outcome.VERDICT_STATUS.items()
    }
    return table(("status", "when"), ((str(status), rows[status]) for status in sorted(rows)))


RETURNED = (
    "gaccum_exp.SweepResult",
    "gaccum_exp.audit.result.Audit", "gaccum_exp.audit.result.Culprit", "gaccum_exp.audit.result.Check",
    "gaccum_exp.audit.result.ParameterError", "gaccum_exp.audit.watch.watch.Watched",
    "gaccum_exp.audit.audited_window.AuditedWindow", "gaccum_exp.memory.plan.MemoryPlan",
    "gaccum_exp.memory.plan.Row", "gaccum_exp.core.window_loss.WindowLoss", "gaccum_exp.core.noise_scale.NoiseScale",
)  # fmt: skip
LOSSES = (
    "gaccum_exp.core.losses.protocol.LossFn", "gaccum_exp.core.losses.protocol.Term",
    "gaccum_exp.core.losses.protocol.at_least", "gaccum_exp.core.strategies.InPlace",
)  # fmt: skip
INTEGRATIONS = (
    "gaccum_exp.integrations.lightning.AuditCallback", "gaccum_exp.integrations.transformers.AuditCallback",
    "gaccum_exp.integrations.due.BiasedAccumulationWarning", "gaccum_exp.integrations.pytest_plugin.audit_loop",
)  # fmt: skip
ERRORS = ("gaccum_exp.BadInputError",)


def of_api() -> str:
    """Return what the package exports, what that returns, and the integrations."""
    functions = [name for name in sorted(gaccum_exp.__all__) if name[0].islower()]
    parts = {
        "Functions": [f"gaccum_exp.{name}" for name in functions], "What they return": RETURNED,
        "Losses and strategies of your own": LOSSES,
        "In other frameworks": INTEGRATIONS, "Errors": ERRORS,
    }  # fmt: skip
    return "\n\n".join(f"## {title}\n\n{_documented(names)}" for title, names in parts.items())


def _documented(names: Iterable[str]) -> str:
    return "\n\n".join(eval_rst(_directive(name)) for name in names)


def _directive(name: str) -> str:
    """Return autodoc's directive for a name: a class with its members, or a function."""
    last = name.rpartition(".")[2]
    if last[0].isupper():
        return f".. autoclass:: {name}\n   :members:\n   :undoc-members:"
    return f".. autofunction:: {name}"


def eval_rst(text: str) -> str:
    """Return reStructuredText as a part of a Markdown page."""
    return f"```{{eval-rst}}\n{text}\n```"


GENERATED: dict[str, Callable[[], str]] = {
    "keys": of_keys, "blocks": of_blocks, "metrics": of_metrics, "columns": of_columns,
    "batch_columns": of_batch_columns, "causes": of_causes, "exit_statuses": of_exit_statuses,
    "tasks": of_tasks, "api": of_api,
}  # fmt: skip


class Generated(SphinxDirective):
    """Render one of `GENERATED` in place."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        text = GENERATED[self.arguments[0]]()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def with_code_blocks(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Mark an indented block that follows an empty line as code, and let a star be a star.

    Docstrings here are plain text, with neither `::` nor escapes.
    """
    lines[:] = [re.sub(r"(?<![\w`*\\])\*(?=\w)", r"\\*", line) for line in lines]
    for i in range(len(lines) - 1, 0, -1):
        before = next((line for line in reversed(lines[:i]) if line.strip()), "")
        opens = lines[i].strip() and not lines[i - 1].strip() and before
        if opens and _indent(lines[i]) >= _indent(before) + 4 and not re.match(r"\s*\w+:$", before):
            lines[i:i] = [f"{' ' * _indent(before)}::", ""]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", with_code_blocks, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
