"""Measure *Accumulation explained* and fill in both its pages: `python experiments/explained/build.py`.

Half a minute of one core. The numbers lie in `results.json`, with where they come from: as long as they
come out the same, that stays as well, and so does every byte of pages and figures. `--draw` fills in and
draws what is there.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.explained.claims import measure
from experiments.explained.pages import PAGES, ROOT, filled, run
from experiments.notebook import asked_to_draw, provenance
from gaccum_exp.report.figures import style

RESULTS = Path(__file__).resolve().parent / "results.json"
FIGURES = ROOT / "docs" / "_static"
PRINTS = ("adds", "mean", "bias", "window", "package", "sum", "left", "index")
"""What the blocks that print are called, in their order."""
HEADS = {
    "weights": {
        "en": ("sizes", "N", "weight of a sample, by micro-batch", "off by", "by the formula"),
        "zh": ("各微批样本数", "N", "各微批中每个样本的权重", "相对误差", "公式给出"),
    },
    "training": {
        "en": (
            "way",
            "micro-batches",
            "largest distance of the loss",
            "weights off by",
            "held-out accuracy",
        ),
        "zh": ("方式", "微批", "损失的最大差距", "参数的相对误差", "留出集准确率"),
    },
    "sum": {
        "en": (
            "optimizer",
            "length of the first step",
            "weights off by",
            "training loss",
            "with the mean",
        ),
        "zh": ("优化器", "第一步的步长", "参数的相对误差", "训练损失", "用均值时"),
    },
    "others": {
        "en": ("in the window", "off by", "done right", "how", "cause by `watch`"),
        "zh": ("窗口中有", "相对误差", "改正之后", "做法", "`watch` 指出的原因"),
    },
    "memory": {"en": ("N", "micro-batch", "peak in KiB", "×"), "zh": ("N", "微批", "峰值（KiB）", "×")},
    "worth": {
        "en": (
            "global batch",
            "N",
            "optimizer steps",
            "rate",
            "loss at equal samples",
            "at {0} steps each",
        ),
        "zh": ("全局批", "N", "步数", "学习率", "同样本数的损失", "各走 {0} 步时"),
    },
}
WAYS = {
    "large": {"en": "the large batch", "zh": "大批量"},
    "mean, equal": {"en": "`mean` ÷ N", "zh": "`mean` ÷ N"},
    "mean, unequal": {"en": "`mean` ÷ N", "zh": "`mean` ÷ N"},
    "sum, rate / n": {"en": "`sum`, learning rate ÷ n", "zh": "`sum`，学习率 ÷ n"},
    "sum / n": {"en": "`sum` ÷ n", "zh": "`sum` ÷ n"},
}
OTHERS = {
    "batch_norm": {"en": ("BatchNorm", "GroupNorm"), "zh": ("BatchNorm", "换成 GroupNorm")},
    "dropout": {
        "en": ("dropout, 0.5", "a mask for each sample"),
        "zh": ("Dropout，0.5", "每个样本用固定的掩码"),
    },
    "tokens": {
        "en": ("labels ignored: 8, 6, 4, 1 count", "sum ÷ what counts"),
        "zh": ("部分标签被忽略：有效数为 8、6、4、1", "求和 ÷ 窗口的有效数"),
    },
    "class_weights": {
        "en": ("class weights, 10 and 1", "sum ÷ sum of weights"),
        "zh": ("类别权重，10 与 1", "求和 ÷ 权重之和"),
    },
    "clipping": {
        "en": ("clipping per micro-batch", "once per window"),
        "zh": ("逐微批裁剪", "每窗口裁剪一次"),
    },
    "contrastive": {
        "en": ("a contrastive loss", '`strategy="cached"`'),
        "zh": ("对比损失", '`strategy="cached"`'),
    },
}
OPTIMIZERS = {
    "same rate": "学习率不变",
    "rate / n": "学习率 ÷ n",
    "momentum": "动量",
    "weight decay": "权重衰减",
    "clipped at 1": "裁剪阈值 1",
    ", ": "，",
}
"""Words of the English rows, in Chinese."""


def main() -> None:
    """Measure, unless only asked to draw; keep the numbers, draw them, fill in the pages."""
    if not asked_to_draw(RESULTS):
        keep(built())
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(kept["numbers"], FIGURES)
    for language, path in PAGES.items():
        page = path.read_text(encoding="utf-8")
        path.write_text(filled(page, said(kept, language)), encoding="utf-8")


def built() -> dict[str, Any]:
    """Run the code of the English page and measure with what it defines."""
    torch.set_num_threads(1)
    where = provenance()
    page, printed = run(PAGES["en"].read_text(encoding="utf-8"))
    outputs = [text for text in printed if text]
    numbers = measure(page) | {"printed": dict(zip(PRINTS, outputs, strict=True))}
    return {"numbers": json.loads(json.dumps(numbers)), "provenance": where}


def keep(new: dict[str, Any]) -> None:
    """Write the numbers; where they come from stays as it was if they are the same."""
    if RESULTS.exists() and json.loads(RESULTS.read_text(encoding="utf-8"))["numbers"] == new["numbers"]:
        return
    RESULTS.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")


# What the pages say


def said(kept: dict[str, Any], language: str) -> dict[str, str]:
    """Return what is filled into the places of a page."""
    of, edges, worth = kept["numbers"]["clearing"], kept["numbers"]["edges"], kept["numbers"]["worth"]
    numbers = kept["numbers"]
    values = {
        "short_error": f"{numbers['splits']['8, 8, 8, 2']['mean']:.2f}",
        "two_losses_error": rounding(of["two_losses_error"]),
        "two_losses_peak": f"{of['two_losses_peak']:.2f}",
        "cleared_loss": f"{of['cleared_loss']:.2f}",
        "forgotten_loss": f"{of['forgotten_loss']:.2f}",
        "moved_none": rounding(of["moved_none"]),
        "moved_zeros": f"{of['moved_zeros']:.2f}",
        "late_clearing": f"{of['late_clearing']:.2f}",
        "training_steps": str(numbers["training"]["steps"]),
        "left_error": f"{edges['left_error']:.2f}",
        "rest_scale": f"{edges['rest_scale']:.2f}",
        "batch_norm_moved": f"{numbers['others']['batch_norm']['moved']:.1f}",
        "float32": f"{numbers['others']['precision']['float32']:.0e}",
        "bfloat16_buffer": f"{numbers['others']['precision']['bfloat16_buffer']:.1e}",
        "float32_buffer": f"{numbers['others']['precision']['float32_buffer']:.1e}",
        "worth_samples": f"{worth['samples']:,}",
        "noise_scale": f"{worth['noise_scale']:.0f}",
        "noise_low": f"{worth['noise_low']:.0f}",
        "noise_high": f"{worth['noise_high']:.0f}",
        "provenance": kept["provenance"],
    }
    tables = {
        "weights_table": weights_rows(numbers["splits"]),
        "training_table": training_rows(numbers["training"]["ways"], language),
        "sum_table": sum_rows(numbers["sum"], language),
        "others_table": others_rows(numbers["others"], language),
        "memory_table": memory_rows(numbers["memory"]),
        "worth_table": worth_rows(worth["table"]),
    }
    least = min(row["steps"] for row in worth["table"].values())
    for name, rows in tables.items():
        heads = (head.format(least) for head in HEADS[name.removesuffix("_table")][language])
        values[name] = table(heads, rows)
    return values | {
        f"printed_{name}": f"```text\n{text.strip()}\n```" for name, text in numbers["printed"].items()
    }


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(heads), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounding(value: float) -> str:
    """Return a small relative error: 0, 1.7e-16, or with two digits where it is large."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def weights_rows(splits: dict[str, Any]) -> list[list[str]]:
    """Return a row for each split: its weights in units of 1/n, and how far the gradient is off."""
    return [
        [sizes, str(len(of["weights"])), ", ".join(f"{w:.2f}" for w in of["weights"]),
         rounding(of["mean"]), rounding(of["formula"])]
        for sizes, of in splits.items()
    ]  # fmt: skip


def training_rows(ways: dict[str, Any], language: str) -> list[list[str]]:
    """Return a row for each way to train."""
    return [
        [WAYS[name][language], ", ".join(map(str, way["sizes"])), rounding(max(way["gap"])),
         rounding(way["weights"]), f"{way['accuracy']:.3f}"]
        for name, way in ways.items()
    ]  # fmt: skip


def sum_rows(ways: dict[str, Any], language: str) -> list[list[str]]:
    """Return a row for each optimizer."""
    rows = []
    for name, way in ways.items():
        if language == "zh":
            for english, chinese in OPTIMIZERS.items():
                name = name.replace(english, chinese)
        length = f"{way['first_step']:.3g} ×"
        rows.append(
            [name, length, rounding(way["weights"]), f"{way['loss']:.3f}", f"{way['mean_loss']:.3f}"]
        )
    return rows


def others_rows(others: dict[str, Any], language: str) -> list[list[str]]:
    """Return a row for each of what else breaks the equality."""
    return [
        [words[language][0], rounding(others[name]["off"]), rounding(others[name]["right"]),
         words[language][1], others[name]["cause"]]
        for name, words in OTHERS.items()
    ]  # fmt: skip


def memory_rows(peaks: dict[str, int]) -> list[list[str]]:
    """Return a row for each N."""
    return [
        [n, str(1024 // int(n)), f"{peak / 1024:,.0f}", f"{peak / peaks['1']:.2f}"]
        for n, peak in peaks.items()
    ]


def worth_rows(batches: dict[str, Any]) -> list[list[str]]:
    """Return a row for each global batch."""
    return [
        [batch, str(of["accum_steps"]), str(of["steps"]), f"{of['rate']:g}",
         *(f"{of[where][0]:.3f} ± {of[where][1]:.3f}" for where in ("equal_samples", "equal_steps"))]
        for batch, of in batches.items()
    ]  # fmt: skip


# Figures, which hold no word that would have to be translated


def draw(numbers: dict[str, Any], folder: Path) -> None:
    """Draw both figures."""
    for draw_one in (draw_weights, draw_gap):
        draw_one(numbers, folder)


@style.styled()
def draw_weights(numbers: dict[str, Any], folder: Path) -> None:
    """Draw the weight of each sample, a panel a split; a micro-batch is as wide as it holds samples."""
    splits = numbers["splits"]
    figure = Figure(figsize=(style.width(), 2.3), layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True)
    for axes, (sizes, of) in zip(panels, splits.items(), strict=True):
        begin = 0
        for index, (size, weight) in enumerate(
            zip(map(int, sizes.split(", ")), of["weights"], strict=True)
        ):
            axes.bar(range(begin, begin + size), weight, width=1.0, align="edge", edgecolor="white",
                     linewidth=0.4, color=style.color(index, len(of["weights"])))  # fmt: skip
            begin += size
        axes.axhline(1.0, color=style.ACCENT, linestyle=(0, (4, 2)))
        axes.set(title=sizes.replace(", ", " + "), xlabel="j", xlim=(0, begin), yscale="log")
        axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
        axes.yaxis.minorticks_off()
    panels[0].set(ylabel="n · w(j)", ylim=(0.2, 10))
    style.save(figure, folder, "accumulation_weights", ("png",))


@style.styled()
def draw_gap(numbers: dict[str, Any], folder: Path) -> None:
    """Draw how far each way's loss is from the large batch's, up to each optimizer step."""
    ways = {name: way for name, way in numbers["training"]["ways"].items() if name != "large"}
    figure = Figure(figsize=(style.width(), 2.9), layout="constrained")
    axes = figure.subplots()
    for index, (name, way) in enumerate(ways.items()):
        label = f"{name.split(',')[0]}: {' + '.join(map(str, way['sizes']))}"
        if name == "sum, rate / n":
            label = "sum, lr/n: " + label.split(": ")[1]
        look = style.look(index, len(ways)) | {"markevery": (10 * index, 40)}
        steps = range(1, len(way["gap"]) + 1)
        axes.plot(steps, [max(value, 1e-17) for value in running(max, way["gap"])], label=label, **look)
    axes.set(
        xlabel="k", ylabel="max |L(k) − L₁(k)|", yscale="log", xlim=(0, numbers["training"]["steps"])
    )
    axes.yaxis.set_major_locator(FixedLocator([10.0**e for e in range(-16, 1, 4)]))
    axes.grid(axis="y")
    axes.set_ylim(3e-18, 1)
    figure.legend(loc="outside lower center", ncols=2)
    style.save(figure, folder, "accumulation_gap", ("png",))


def running(most: Callable[[float, float], float], values: Sequence[float]) -> list[float]:
    """Return the greatest value so far at each place."""
    found = list(values[:1])
    for value in values[1:]:
        found.append(most(found[-1], value))
    return found


if __name__ == "__main__":
    main()
