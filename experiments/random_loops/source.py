"""The text of a loop, as somebody would write it.

A loop is written out and not interpreted from its plan: then each call stands in a line of its own, and
a loop that is judged wrongly can be read.
"""

from experiments.random_loops.plan import Plan
from experiments.random_loops.terms import Term

MASKED = """
def masked(out, target, keep, reduction="mean"):
    total = ((out - target) ** 2 * keep).sum()
    return total if reduction == "sum" else total / keep.sum(){inside}
"""
FOCAL = """
def focal(out, target, reduction="mean"):
    p = out.sigmoid()
    each = (target - p) ** 2 * F.binary_cross_entropy_with_logits(out, target, reduction="none")
    return each.sum() if reduction == "sum" else each.sum() / target.sum().clamp(min=1){inside}
"""
CENTRED = """
class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=DTYPE))

    def forward(self, out, target):
        loss = -(((target - self.centre) / 0.5).softmax(-1) * out.log_softmax(-1)).sum(-1).mean(){moves}
        return loss
"""
TEACHER = """with torch.no_grad():
    for old, new in zip(teacher.parameters(), model.parameters()):
        old.lerp_(new, 0.5)"""
CLIP = "nn.utils.clip_grad_norm_(model.parameters(), MOST)"


def text_of(plan: Plan) -> str:
    """Return the module that holds the loop: `train(model, optimizer, window)`, and what it needs.

    The names F, nn, torch, N, DTYPE, WEIGHT, MOST and `teacher` are given.
    """
    inside = (
        " / N" if plan.how == "inside" and plan.form == "own" and _fault(plan) != "not divided" else ""
    )
    kinds = {term.kind for term in plan.terms}
    parts = [MASKED.format(inside=inside)] if "masked" in kinds else []
    parts += [FOCAL.format(inside=inside)] if "focal" in kinds else []
    if "centred" in kinds:
        moves = "\n        self.centre.lerp_(target.mean(0).detach(), 0.5)"
        parts.append(CENTRED.format(moves=moves if plan.fault == "centre moves" else ""))
    if plan.form == "criterion":
        parts.append(f"criterion = {_criterion(plan)}")
    if plan.whole:
        parts.append(_whole_loss(plan))
    return "\n\n".join(part.strip("\n") for part in [*parts, _train(plan)]) + "\n"


def _fault(plan: Plan) -> str:
    return plan.fault or ""


def _criterion(plan: Plan) -> str:
    first = plan.terms[0]
    if first.kind == "centred":
        return "Centred()"
    arguments = ["weight=WEIGHT"] if first.kind == "weighted" else []
    arguments += ['reduction="sum"'] if plan.reads_sums else []
    return f"{first.of.criterion}({', '.join(arguments)})"


def _count(term: Term, batch: str = "m") -> str:
    return term.of.count.format(t=term.name, h=term.head).replace("m[", f"{batch}[")


def _share(term: Term) -> str:
    """Write what a micro-batch's mean is divided by, over what the window's is."""
    return f"{_count(term)}{'.clamp(min=1)' if term.of.clamped else ''} / n_{term.name}"


def _call(plan: Plan, term: Term) -> str:
    """Write the call of a term's loss."""
    out = ("further" if term.call else "out") + (f"[{term.head}]" if len(plan.terms) > 1 else "")
    taught = f"taught[{term.head}]" if len(plan.terms) > 1 else "taught"
    target = taught if term.kind == "teacher" else f'm["{term.name}"]'
    if plan.tokens and term.of.width == 3 and plan.middle != "few":
        out, target = f"{out}.flatten(0, 1)", f"{target}.flatten()"
    arguments = f"{out}, {target}"
    if plan.form == "criterion":
        return f"criterion({arguments})"
    extra = term.of.extra.format(t=term.name)
    reduction = ', reduction="sum"' if plan.reads_sums or term.summed else ""
    return f"{term.of.call}({arguments}{extra}{reduction})"


def _scaled(plan: Plan, term: Term) -> str:
    """Write a term with its weight and its share, but for a division of the whole loss by N."""
    written, fault = _call(plan, term), _fault(plan)
    if term.weight != 1:
        written = f"{term.weight} * {written}"
    if fault == "a term's weight moves" and term is plan.terms[-1]:
        written = f"(i + 1) / N * {written}"
    if term.summed:
        return written
    if plan.written == "sums":
        return f"{written} / n_{term.name}"
    if plan.written == "share" and not plan.whole:
        counted = term
        if fault == "one term's count for another" and term is plan.terms[-1]:
            counted = next(t for t in plan.terms if not t.summed)
        if fault == "counted by samples":
            which = "u" if term.call else "x"
            return f'{written} * len(m["{which}"]) / samples_{which}'
        return f"{written} * {_share(counted)}"
    if plan.written == "equal" and not plan.whole and _each_divided(plan) and fault != "not divided":
        skipped = fault == "one term not divided" and term.weight == 1 and term is not plan.terms[0]
        return written if skipped else f"{written} / N"
    return written


def _each_divided(plan: Plan) -> bool:
    """Whether N divides each term, and not the loss that they make."""
    return plan.apart or any(t.summed for t in plan.terms) or _fault(plan) == "one term not divided"


def _whole_loss(plan: Plan) -> str:
    """Write the function, criterion or model that computes the whole loss."""
    totals = [f"n_{term.name}" for term in plan.terms] if plan.written == "sums" else []
    loss = " + ".join(_scaled(plan, term) for term in plan.terms)
    if _fault(plan) == "a term's weight moves":
        totals.append("i")
    if _fault(plan) == "a term couples samples":
        out = "out[0]" if len(plan.terms) > 1 else "out"
        loss += f" + 0.5 * ({out} - {out}.mean(0)).square().mean()"
    if plan.how == "inside" and _fault(plan) != "not divided":
        loss = f"({loss}) / N"
    returned = {"loss": "loss", "tuple": "loss, out", "dict": '{"loss": loss, "out": out}'}[plan.returns]
    body = [*_model_calls(plan), *_taught(plan)] if plan.form == "compute_loss" else []
    body += [f"loss = {loss}", f"return {returned}"]
    if plan.form == "compute_loss":
        head = [f"def compute_loss({', '.join(['model', 'm', *totals])}):"]
        return "\n".join(head + _indented(body, 1))
    outputs = ["out", *(["further"] if plan.further else [])]
    if plan.form == "module":
        head = [
            "class Losses(nn.Module):",
            f"    def forward({', '.join(['self', *outputs, 'm', *totals])}):",
        ]
        return "\n".join(head + _indented(body, 2)) + "\n\ncriterion = Losses()"
    head = [
        "class WithLoss(nn.Module):", "    def __init__(self, net):", "        super().__init__()",
        "        self.net = net", "", f"    def forward({', '.join(['self', 'm', *totals])}):",
        '        out = self.net(m["x"])',
    ]  # fmt: skip
    return "\n".join(head + _indented(body, 2))


def _model_calls(plan: Plan) -> list[str]:
    return ['out = model(m["x"])', *(['further = model(m["u"])'] if plan.further else [])]


def _taught(plan: Plan) -> list[str]:
    if all(term.kind != "teacher" for term in plan.terms):
        return []
    of = next("u" if term.call else "x" for term in plan.terms if term.kind == "teacher")
    return ["with torch.no_grad():", f'    taught = teacher(m["{of}"])']


def _losses(plan: Plan) -> list[str]:
    """Write the lines from a micro-batch to its backward passes."""
    fault = _fault(plan)
    by = " / N" if plan.written == "equal" and not _each_divided(plan) and fault != "not divided" else ""
    if fault == "divided twice":
        by += " / N"
    if plan.whole:
        return _whole_lines(plan, by)
    lines = [*_model_calls(plan), *_taught(plan)]
    guarded = (
        plan.terms[-1] if plan.empty and not plan.reads_sums and not plan.terms[-1].of.clamped else None
    )
    if guarded and len(plan.terms) == 1:
        lines.insert(0 if plan.seed % 2 else 1, f"if not {_count(guarded)}:\n    continue")
    if plan.apart:
        for term in plan.terms:
            later = any(t.call == term.call for t in plan.terms[plan.terms.index(term) + 1 :])
            keep = "retain_graph=True" if later else ""
            line = f"({_scaled(plan, term)}{by}).backward({keep})"
            lines += [f"if {_count(term)}:", f"    {line}"] if term is guarded else [line]
        return lines
    names = []
    for term in plan.terms:
        line = f"loss_{term.name} = {_scaled(plan, term)}"
        if term is guarded and len(plan.terms) > 1:
            lines += [
                f"loss = {' + '.join(names)}",
                f"if {_count(term)}:",
                f"    loss = loss + {_scaled(plan, term)}",
            ]
            return [*lines, f"(loss{by}).backward()" if by else "loss.backward()"]
        lines.append(line)
        names.append(f"loss_{term.name}")
    lines.append(f"loss = {' + '.join(names)}" if not by else f"loss = ({' + '.join(names)}){by}")
    return [*lines, "loss.backward()"]


def _whole_lines(plan: Plan, by: str) -> list[str]:
    totals = [f"n_{term.name}" for term in plan.terms] if plan.written == "sums" else []
    if _fault(plan) == "a term's weight moves":
        totals.append("i")
    picked = {"loss": "", "tuple": "[0]", "dict": '["loss"]'}[plan.returns]
    lines, outputs = [], ["out", *(["further"] if plan.further else [])]
    if plan.form == "compute_loss":
        call = f"compute_loss({', '.join(['model', 'm', *totals])})"
    elif plan.form == "module":
        lines, call = _model_calls(plan), f"criterion({', '.join([*outputs, 'm', *totals])})"
    else:
        call = f"model({', '.join(['m', *totals])})"
    loss = f"{call}{picked}"
    if plan.written == "share":
        term = plan.terms[0]
        share = 'len(m["x"]) / samples_x' if _fault(plan) == "counted by samples" else _share(term)
        loss = f"{loss} * {share}"
    return [*lines, f"loss = {loss}{by}", "loss.backward()"]


def _train(plan: Plan) -> str:
    fault = _fault(plan)
    lines = []
    if plan.written in ("share", "sums", "after"):
        for term in plan.terms:
            if term.summed:
                continue
            if term.kind == "teacher":
                size = 'm["u"]' if term.call else 'm["x"]'
                counted = f"sum(teacher({size})[{term.head}].numel() for m in window)"
            else:
                counted = f"sum({_count(term)} for m in window)"
            lines.append(f"n_{term.name} = {f'max(1, {counted})' if term.of.clamped else counted}")
    if fault == "counted by samples":
        lines += ['samples_x = sum(len(m["x"]) for m in window)']
        lines += ['samples_u = sum(len(m["u"]) for m in window)'] if plan.further else []
    if fault != "never zeroed":
        lines.append("optimizer.zero_grad()")
    kept = {"only the first kept": "first = {}", "added up in bfloat16": "total = {}"}
    lines += [kept[fault]] if fault in kept else []
    over = "window[:-1]" if fault == "a micro-batch short" else "window"
    lines.append(f"for i, m in enumerate({over}):")
    inner = ["optimizer.zero_grad()"] if fault == "zero_grad inside" else []
    inner += _losses(plan) + AFTER_BACKWARD.get(fault, [])
    lines += _indented(inner, 1)
    lines += AFTER_WINDOW.get(fault, [])
    if plan.written == "after":
        lines += [
            "for p in model.parameters():",
            "    if p.grad is not None:",
            f"        p.grad /= n_{plan.terms[0].name}",
        ]
    lines += [CLIP] if plan.clipped and fault != "clipped inside" else []
    lines.append("optimizer.step()")
    if any(t.kind == "teacher" for t in plan.terms) and fault != "teacher moves":
        lines += TEACHER.split("\n")
    if plan.terms[0].kind == "centred" and fault != "centre moves":
        lines.append('criterion.centre.lerp_(torch.cat([m["a"] for m in window]).mean(0), 0.5)')
    return "\n".join(["def train(model, optimizer, window):", *_indented(lines, 1)])


AFTER_BACKWARD: dict[str, list[str]] = {
    "clipped inside": [CLIP],
    "cleared halfway": ["if i == N // 2:", "    for p in model.parameters():", "        p.grad = None"],
    "only the first kept": [
        "for p in model.parameters():", "    if p.grad is not None and p not in first:",
        "        first[p] = p.grad.clone()", "    p.grad = None",
    ],
    "added up in bfloat16": [
        "for p in model.parameters():", "    if p.grad is not None:",
        "        total[p] = total.get(p, 0) + p.grad.bfloat16()", "        p.grad = None",
    ],
    "teacher moves": TEACHER.split("\n"),
}  # fmt: skip
AFTER_WINDOW: dict[str, list[str]] = {
    "only the first kept": ["for p, g in first.items():", "    p.grad = g"],
    "added up in bfloat16": ["for p, g in total.items():", "    p.grad = g.to(p.dtype)"],
}


def _indented(lines: list[str], depth: int) -> list[str]:
    return [f"{'    ' * depth}{line}" for each in lines for line in each.split("\n")]
