"use strict";
// Draws the page's figures with Vega and redraws them as the controls, the width or the colour scheme
// change. Data come from the element `data`, colours from the style sheet.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const views = new Map();
  const newest = new Map(); // of each element what it was asked to show last
  const DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]];
  const WORTH_NAMING = 9;
  const INDEX_LABEL = 22; // pixels that a micro-batch's number takes, and those of one with its weight
  const WEIGHT_LABEL = 76;
  const BAR_LABEL = 48; // pixels that a ratio above a bar takes
  const DECADES = 4;
  const MOST_DECADES = 7;
  const ERRORS = 1; // a layer without data is no reason to warn

  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const form = (section) => document.querySelector(`#${section} form`);
  const chosen = (section, name) => form(section)?.elements.namedItem(name)?.value;
  const listed = new Intl.ListFormat("en-GB", { type: "conjunction" });

  // --- drawing

  function looks() {
    const soft = color("soft");
    const axis = {
      labelColor: soft, titleColor: soft, domainColor: color("rule"), tickColor: color("rule"),
      gridColor: color("rule"), gridOpacity: 0.55, labelFontSize: 12, titleFontSize: 12,
      titleFontWeight: "normal", titlePadding: 8, labelPadding: 4,
      labelFont: getComputedStyle(document.body).fontFamily,
      titleFont: getComputedStyle(document.body).fontFamily,
    };
    return { axis, style: { cell: { stroke: null }, text: { font: axis.labelFont } } };
  }

  /** Return a specification with its data, its titles, and ticks by scale where these are given. */
  function filled(name, data, titles) {
    const spec = JSON.parse(JSON.stringify(page.specs[name]), (_, value) =>
      typeof value === "string" ? value.replace(/@(\w+)/g, (all, title) => titles[title] ?? all) : value);
    for (const source of spec.data) {
      if (source.name in data) source.values = data[source.name];
    }
    for (const axis of spec.axes) {
      const ticks = titles.ticks?.[axis.scale];
      if (ticks) axis.values = ticks;
    }
    return spec;
  }

  /** Draw anew; expressions are interpreted, so that no policy against `eval` keeps the page from drawing. */
  async function draw(element, name, data, titles = {}) {
    // It is drawn out of sight, as wide as the element: what was asked for since is not overwritten.
    const drawing = document.createElement("div");
    drawing.className = "pending";
    newest.set(element, drawing);
    element.append(drawing);
    const { view } = await vegaEmbed(drawing, filled(name, data, titles), {
      mode: "vega", renderer: "svg", ast: true, config: looks(), logLevel: ERRORS,
      actions: false, tooltip: false, hover: false, defaultStyle: false,
    });
    if (newest.get(element) !== drawing) {
      view.finalize();
      drawing.remove();
      return;
    }
    views.get(element)?.finalize();
    views.set(element, view);
    if (shown?.element === element) hide();
    element.tabIndex = 0;
    // The element around it is the image, and says what it shows.
    drawing.querySelector("svg").setAttribute("aria-hidden", "true");
    drawing.classList.remove("pending");
    element.replaceChildren(drawing);
  }

  function say(element, words) {
    newest.set(element, words);
    views.get(element)?.finalize();
    views.delete(element);
    if (shown?.element === element) hide();
    element.removeAttribute("tabindex");
    element.textContent = words;
  }

  // --- what a mark says, to the pointer and to the keyboard

  const tip = document.getElementById("tip");
  const ring = document.getElementById("ring");
  const found = new WeakMap(); // the marks of a view
  let shown = null;

  /**
   * Return the marks of a figure that say something, in pixels from its corner: those of a series next to
   * each other, from left to right. A row of data says what its mark is: `series`, and `says` with two texts.
   */
  function marksOf(view) {
    if (found.has(view)) return found.get(view);
    const marks = new Map(); // one for a row, which several layers may draw
    const visit = (mark, left, top) => {
      for (const item of mark.items ?? []) {
        if (mark.marktype === "group") {
          item.items.forEach((inner) => visit(inner, left + (item.x ?? 0), top + (item.y ?? 0)));
        } else if (item.datum?.says && !marks.has(item.datum)) {
          // Of a line its points have no bounds.
          const point = { x1: item.x, x2: item.x, y1: item.y, y2: item.y };
          const { x1, x2, y1, y2 } = mark.marktype === "line" ? point : item.bounds;
          if (Number.isFinite(x1 + x2 + y1 + y2)) {
            marks.set(item.datum, { row: item.datum, x1: x1 + left, x2: x2 + left, y1: y1 + top, y2: y2 + top });
          }
        }
      }
    };
    visit(view.scenegraph().root, ...view.origin());
    const every = [...marks.values()].sort((a, b) => a.row.series - b.row.series || a.x1 - b.x1 || a.y1 - b.y1);
    found.set(view, every);
    return every;
  }

  const middle = ({ x1, x2, y1, y2 }) => [(x1 + x2) / 2, (y1 + y2) / 2];
  const outside = (at, low, high) => Math.max(low - at, 0, at - high);

  function nearest(marks, x, y) {
    let [best, least] = [null, Infinity];
    for (const mark of marks) {
      const distance = Math.hypot(outside(x, mark.x1, mark.x2), outside(y, mark.y1, mark.y2));
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  }

  /** Say what a mark is, beside it, and ring it. */
  function show(element, mark) {
    if (shown?.mark === mark) return;
    const [name, words] = mark.row.says();
    const heading = document.createElement("strong");
    heading.textContent = name;
    tip.replaceChildren(heading, words);
    ring.hidden = false;
    const at = element.getBoundingClientRect();
    const [left, top] = [at.left + scrollX, at.top + scrollY];
    const edge = 4;
    Object.assign(ring.style, {
      left: `${left + mark.x1 - edge}px`, top: `${top + mark.y1 - edge}px`,
      width: `${mark.x2 - mark.x1 + 2 * edge}px`, height: `${mark.y2 - mark.y1 + 2 * edge}px`,
    });
    const most = root.clientWidth - tip.offsetWidth - edge;
    const above = top + mark.y1 - tip.offsetHeight - 3 * edge;
    tip.style.left = `${Math.max(edge, Math.min(most, left + middle(mark)[0] - tip.offsetWidth / 2))}px`;
    tip.style.top = `${above < scrollY ? top + mark.y2 + 3 * edge : above}px`;
    shown = { element, mark };
  }

  function hide() {
    shown = null;
    tip.replaceChildren();
    ring.hidden = true;
  }

  function pointed(event) {
    const element = event.currentTarget;
    const view = views.get(element);
    if (!view) return;
    const { left, top } = element.getBoundingClientRect();
    const mark = nearest(marksOf(view), event.clientX - left, event.clientY - top);
    if (mark) show(element, mark);
    else hide();
  }

  /** Return the mark that a key leads to: of the same series, or of the one below or above where it is nearest. */
  function reached(marks, from, key) {
    const place = marks.indexOf(from);
    if (place < 0 || key === "Home") return marks[0];
    if (key === "End") return marks.at(-1);
    const series = from.row.series;
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const next = marks[place + (key === "ArrowLeft" ? -1 : 1)];
      return next?.row.series === series ? next : from;
    }
    const others = marks.filter((mark) => (key === "ArrowUp" ? mark.row.series < series : mark.row.series > series));
    const nextSeries = others.at(key === "ArrowUp" ? -1 : 0)?.row.series;
    const far = (mark) => Math.abs(middle(mark)[0] - middle(from)[0]);
    return others.filter((mark) => mark.row.series === nextSeries)
      .reduce((best, mark) => (far(mark) < far(best) ? mark : best), others.find((mark) => mark.row.series === nextSeries) ?? from);
  }

  function pressed(event) {
    const element = event.currentTarget;
    const view = views.get(element);
    if (!view || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    const marks = marksOf(view);
    if (!marks.length) return;
    event.preventDefault();
    show(element, reached(marks, shown?.element === element ? shown.mark : null, event.key));
  }

  document.querySelectorAll(".plot").forEach((element) => {
    element.addEventListener("pointermove", pointed);
    element.addEventListener("pointerdown", pointed);
    element.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") hide(); // a finger leaves with every tap
    });
    element.addEventListener("keydown", pressed);
    element.addEventListener("focus", () => {
      const [first] = views.has(element) ? marksOf(views.get(element)) : [];
      if (first && element.matches(":focus-visible")) show(element, first);
    });
    element.addEventListener("blur", () => {
      if (shown?.element === element) hide();
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // --- loss curves

  const AXES = {
    steps: ["optimizer steps", (curve) => curve.steps],
    samples: ["samples", (curve) => curve.samples ?? curve.steps.map((step) => step * curve.batch)],
    seconds: ["seconds", (curve) => curve.steps.map((step) => step * curve.step_s)],
  };

  function shownGroups() {
    const boxes = form("curves").querySelectorAll("input[name=group]");
    return new Set([...boxes].filter((box) => box.checked).map((box) => Number(box.value)));
  }

  /** Return powers of ten as ticks of a log axis, or none where there would be fewer than three. */
  function decades(values) {
    const known = values.filter((value) => value > 0);
    const [low, high] = [Math.floor(Math.log10(Math.min(...known))), Math.ceil(Math.log10(Math.max(...known)))];
    const every = Math.ceil((high - low) / MOST_DECADES) || 1;
    const ticks = [];
    for (let k = low; k <= high; k += every) ticks.push(Number(`1e${k}`));
    return ticks.length < 3 ? null : ticks;
  }

  const counted = (value) => Math.round(value).toLocaleString("en-GB");
  const number = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)
    ? value.toExponential(2) : String(Number(value.toPrecision(4))));
  const ends = ({ low, high }) => (low === high ? "" : ` (${number(low)} to ${number(high)})`);

  const isKnown = (value) => value !== null && value !== undefined;
  const anyKnown = (curves) => curves.some((of) => of.values.some(isKnown));

  /** Return rows for lines, ranges and values that no line passes through; `least` takes the place of what a log axis cannot show. */
  function curveRows(curves, axis, least, what) {
    const lines = [];
    const ranges = [];
    const dots = [];
    const displayed = (value) => (value === null || least === null ? value : value > 0 ? Math.max(value, least) : least || null);
    curves.forEach((curve, index) => {
      const own = {
        curve: index, color: color(`s${curve.group}`), strokeDash: DASHES[curve.group % DASHES.length],
        strokeWidth: curve.is_reference ? 4.5 : 1.8, opacity: curve.is_reference ? 0.55 : 1,
      };
      const values = curve.values.map(displayed);
      const says = (x, i) => () => {
        const at = axis === "steps" ? "" : `, ${counted(x)} ${AXES[axis][0]}`;
        const range = isKnown(curve.low?.[i]) ? ` (${number(curve.low[i])} to ${number(curve.high[i])})` : "";
        return [curve.name, `step ${counted(curve.steps[i])}${at}: ${what} ${number(curve.values[i])}${range}`];
      };
      AXES[axis][1](curve).forEach((x, i) => {
        const row = { ...own, x, y: values[i], series: index, says: says(x, i) };
        lines.push(row);
        const [before, here, after] = [i - 1, i, i + 1].map((at) => isKnown(values[at]));
        if (here && !before && !after) dots.push(row);
        if (curve.low && curve.low[i] !== null) {
          ranges.push({ ...own, x, low: displayed(curve.low[i]), high: displayed(curve.high[i]) });
        }
      });
    });
    return { lines, ranges, dots };
  }

  function drawCurves() {
    const groups = shownGroups();
    const axis = chosen("curves", "axis");
    const scale = chosen("curves", "scale");
    const visible = (curves) => curves.filter((curve) => groups.has(curve.group));
    page.curves.panels.forEach((panel, index) => {
      const losses = visible(panel.losses);
      const element = document.querySelector(`[data-plot=loss][data-panel="${index}"]`);
      if (losses.some((of) => of.values.some(scale === "log" ? (value) => value > 0 : isKnown))) {
        const ticks = { y: scale === "log" ? decades(losses.flatMap((of) => of.values)) : null };
        draw(element, `loss ${scale}`, curveRows(losses, axis, scale === "log" ? 0 : null, "train loss"), { axis: AXES[axis][0], ticks });
      } else {
        const none = anyKnown(losses) ? "No loss of these arms is above 0." : "No loss of these arms is a number.";
        say(element, losses.length ? none : "No arm is chosen.");
      }
      const below = document.querySelector(`[data-plot=gap][data-panel="${index}"]`);
      if (below) drawGaps(below, visible(panel.gaps), panel, axis);
    });
  }

  function drawGaps(element, gaps, { envelopes, last_digit: digit }, axis) {
    const values = [
      ...gaps.flatMap((of) => [...of.values, ...(of.high ?? [])]),
      ...envelopes.flatMap((of) => of.limits), ...(digit?.values ?? []),
    ];
    const positive = values.filter((value) => value > 0);
    if (!anyKnown(gaps)) {
      say(element, gaps.length ? "No difference is a number." : "No arm with a difference is chosen.");
      return;
    }
    if (!positive.length) {
      say(element, "There is no difference at any step.");
      return;
    }
    const least = 10 ** Math.floor(Math.log10(Math.min(...positive) * 0.999));
    const bands = [];
    const limits = [];
    envelopes.forEach((envelope, curve) => {
      AXES[axis][1](envelope).forEach((x, i) => {
        const at = { curve, x };
        bands.push({ ...at, low: least, high: Math.max(least, envelope.values[i]), color: color("band") });
        limits.push({ ...at, y: Math.max(least, envelope.limits[i]), color: color("limit"), strokeDash: [5, 4], strokeWidth: 1.4, opacity: 1 });
      });
    });
    if (digit) {
      AXES[axis][1](digit).forEach((x, i) => {
        bands.push({ curve: -1, x, low: least, high: Math.max(least, digit.values[i]), color: color("band") });
      });
    }
    draw(element, "gap", { ...curveRows(gaps, axis, least, "largest difference so far"), envelopes: bands, limits }, { axis: AXES[axis][0], ticks: { y: decades([least, ...values]) } });
  }

  // --- memory

  const budget = () => Number(chosen("memory", "budget"));
  const peak = (bar) => bar.total ?? bar.planned;
  const inUnit = (size) => `${Number(size.toPrecision(3))} ${page.memory.unit}`;

  function drawMemory() {
    const limit = budget();
    const order = page.memory.categories;
    page.memory.panels.forEach((panel, index) => {
      const element = document.querySelector(`[data-plot=memory][data-panel="${index}"]`);
      const named = element.clientWidth > panel.bars.length * BAR_LABEL;
      const parts = [];
      const planned = [];
      const totals = [];
      for (const bar of panel.bars) {
        const n = bar.n;
        const fits = peak(bar) === null || peak(bar) <= limit;
        for (const [name, size] of Object.entries(bar.parts)) {
          const place = order.indexOf(name);
          parts.push({
            n, size, order: place, color: color(`m${Math.max(place, 0)}`), stroke: color("mline"), opacity: fits ? 1 : 0.35,
            series: -place,
            says: () => [`N = ${n}`, [
              `${name} ${inUnit(size)}`, name !== "total" && `of ${inUnit(bar.total)}`, bar.ratio && `${bar.ratio} the reference’s`,
            ].filter(Boolean).join(", ")],
          });
        }
        if (bar.planned !== null) {
          planned.push({
            n, size: bar.planned, color: color("ink"),
            series: -order.length, says: () => [`N = ${n}`, `planned ${inUnit(bar.planned)}`],
          });
        }
        const size = Math.max(peak(bar) ?? 0, bar.planned ?? 0);
        const unknown = bar.total === null && { series: 0, says: () => [`N = ${n}`, `${bar.missing}: no peak is known`] };
        totals.push({ ...unknown, n, size, label: bar.total === null ? bar.missing : named ? bar.ratio : "", color: color("ink"), stroke: color("paper") });
      }
      const rule = [{ size: limit, color: color("limit") }];
      draw(element, "memory", { parts, planned, totals, budget: rule }, { axis: `peak memory in ${page.memory.unit}` });
    });
  }

  function sayBudget() {
    const limit = budget();
    const input = form("memory").elements.namedItem("budget");
    input.setAttribute("aria-valuetext", inUnit(limit));
    const said = page.memory.panels.map((panel) => [panel.title, saidOf(panel, limit)]);
    const alike = said.every(([, words]) => words === said[0][1]);
    form("memory").elements.namedItem("words").textContent = `With ${inUnit(limit)}: ${
      alike ? said[0][1] : said.map(([title, words]) => `${title}: ${words}`).join(" ")}`;
  }

  /** Say which N of a panel fit. */
  function saidOf(panel, limit) {
    const known = panel.bars.filter((bar) => peak(bar) !== null);
    const unknown = panel.bars.filter((bar) => peak(bar) === null);
    const one = (bar) => `${bar.n}${bar.total === null && bar.planned !== null ? " (planned)" : ""}`;
    const name = (bars) => `N = ${listed.format(bars.map(one))}`;
    const [fits, others] = [known.filter((bar) => peak(bar) <= limit), known.filter((bar) => peak(bar) > limit)];
    const is = (bars, singular, plural) => (bars.length === 1 ? singular : plural);
    const said = !fits.length ? "no N fits that was tried"
      : !others.length ? "every N fits that was tried"
      : `${name(fits)} ${is(fits, "fits", "fit")}; ${name(others)} ${is(others, "does", "do")} not`;
    // Of what was refused or failed nothing is claimed.
    return [...(known.length ? [said] : []), ...(unknown.length ? [`no peak is known of ${name(unknown)}`] : [])].join("; ") + ".";
  }

  function drawTradeoff() {
    const points = page.tradeoff.points.map((point) => (
      {
        ...point, label: point.is_named ? `N = ${point.n}` : "", color: color(`p${point.panel}`), series: point.panel,
        says: () => [
          [`N = ${point.n}`, page.tradeoff.labels.length > 1 && page.tradeoff.labels[point.panel]].filter(Boolean).join(" · "),
          `${number(point.x)} ${page.tradeoff.time}${ends(point)}, ${number(point.y)} ${page.tradeoff.unit}`,
        ],
      }));
    const titles = { axis: `median time of an optimizer step in ${page.tradeoff.time}`, other: `peak memory in ${page.tradeoff.unit}` };
    draw(document.querySelector("[data-plot=tradeoff]"), "tradeoff", { points }, titles);
  }

  // --- one window

  function mixed(from, to, part) {
    const [a, b] = [from, to].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    return `#${a.map((x, i) => Math.round(x + part * (b[i] - x)).toString(16).padStart(2, "0")).join("")}`;
  }

  function luminance(hex) {
    const [r, g, b] = [1, 3, 5].map((i) => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function drawWindows() {
    const arm = Number(chosen("windows", "arm") ?? 0);
    page.windows.forEach((of, index) => {
      document.querySelector(`[data-window="${index}"]`).hidden = index !== arm;
    });
    drawWindow(page.windows[arm], arm);
  }

  /** A weight of one pass is calm; up to twice or half as much it gains colour. */
  function hue(weight) {
    const doublings = Math.log2(weight);
    if (Math.abs(doublings) < 1e-6) return color("calm");
    return mixed(color("calm"), color(doublings > 0 ? "hot" : "cool"), Math.min(1, 0.35 + 0.65 * Math.abs(doublings)));
  }

  const inkOn = (hex) => (luminance(hex) < 0.22 ? "#ffffff" : "#10151c");

  function drawWindow(of, index) {
    const element = (plot) => document.querySelector(`[data-plot=${plot}][data-panel="${index}"]`);
    const known = of.micro.filter((micro) => micro.weight !== null);
    if (known.length) {
      const micro = known.map((m) => ({
        ...m, zero: 0, color: hue(m.weight), stroke: color("paper"), series: 0,
        says: () => [`micro-batch ${m.index + 1}`, `samples ${m.first} to ${m.end - 1}, ${of.weighed} weighs ${number(m.weight)} × what it does in one pass`],
      }));
      const samples = Math.max(...known.map((m) => m.end)) - known[0].first;
      const room = element("window").clientWidth * Math.min(...known.map((m) => m.end - m.first)) / samples;
      const weights = room > WEIGHT_LABEL && known.some((m) => m.weight !== 1);
      const labels = room < INDEX_LABEL ? [] : known.map((m) => ({
        middle: (m.first + m.end) / 2, at: m.weight / 2, color: inkOn(hue(m.weight)),
        label: weights ? `${m.index + 1}: ${m.weight.toPrecision(3)} ×` : String(m.index + 1),
      }));
      draw(element("window"), "window", { micro, labels, one: [{ weight: 1, color: color("ink") }] });
    } else {
      say(element("window"), "What a micro-batch is weighed by is not known.");
    }
    if (element("errors")) drawErrors(element("errors"), of);
  }

  function drawErrors(element, of) {
    const large = of.layers.flatMap((layer) => layer.errors.filter((_, i) => layer.above[i] === "1"));
    const largest = Math.log10(Math.max(...large));
    const fill = (error, above) => {
      if (error === null) return color("raised");
      const decades = largest - Math.log10(error);
      return above ? mixed(color("hot"), color("warm"), Math.min(1, decades / DECADES)) : color("calm");
    };
    const named = of.columns.length <= WORTH_NAMING;
    const said = (error) => (error === null ? "–" : error === 0 ? "0" : error.toExponential(0));
    const cells = of.layers.flatMap((layer, series) => layer.errors.map((error, i) => {
      const own = fill(error, layer.above[i] === "1");
      const where = layer.above[i] === "1" ? "above its rounding floor" : "within its rounding floor";
      return {
        series,
        says: () => [
          `${layer.name}, ${i ? `micro-batch ${of.columns[i]}` : "window"}`,
          error === null ? "no error is known" : `error ${number(error)}, ${where}`,
        ],
        layer: layer.name, micro: of.columns[i], color: own, stroke: color("paper"), ink: inkOn(own),
        label: named ? said(error) : "",
      };
    }));
    draw(element, "errors", { cells });
  }

  // --- the batch

  function drawNoise() {
    const ends = page.noise.intervals.flatMap((of) => [of.high ?? of.low * 4, of.batch * 1.5]);
    const furthest = Math.max(...ends);
    const intervals = page.noise.intervals.map((of, series) => ({
      ...of, high: of.high ?? furthest, color: color("p0"), ink: color("ink"), series,
      says: () => [
        of.label,
        `noise scale ${of.scale === null ? "" : `${number(of.scale)}, `}${of.high === null ? `above ${number(of.low)}` : `${number(of.low)} to ${number(of.high)}`} samples; global batch ${counted(of.batch)}`,
      ],
    }));
    draw(document.querySelector("[data-plot=noise]"), "noise", { intervals });
  }

  function drawBatches() {
    page.batches.forEach((of, index) => {
      const own = color("p0");
      const losses = of.losses.map((loss) => ({
        ...loss, color: own, fill: loss.is_settled ? own : color("paper"), series: 0,
        says: () => [`batch ${counted(loss.batch)}`, `${of.loss}: ${number(loss.loss)}${ends(loss)}`],
      }));
      const furthest = 1.5 * Math.max(...of.losses.map((loss) => loss.batch), of.noise ? of.noise.low * 2 : 0);
      const noise = of.noise ? [{ low: of.noise.low, high: of.noise.high ?? furthest, color: color("band") }] : [];
      const limit = of.limit === null ? [] : [{ loss: of.limit, color: color("p1") }];
      draw(document.querySelector(`[data-plot=batches][data-panel="${index}"]`), "batches", { losses, noise, limit }, { axis: of.loss, ticks: { x: of.losses.map((loss) => loss.batch) } });
    });
  }

  // --- all of it

  const sections = [
    [page.curves, drawCurves], [page.memory, drawMemory], [page.tradeoff, drawTradeoff],
    [page.windows?.length, drawWindows], [page.noise, drawNoise], [page.batches?.length, drawBatches],
  ];

  function drawAll() {
    document.querySelectorAll("[data-category]").forEach((key) => {
      key.style.background = color(`m${page.memory.categories.indexOf(key.dataset.category)}`);
    });
    for (const [data, drawSection] of sections) {
      if (data) drawSection();
    }
  }

  let asked = 0;
  /** Draw once before the next frame, however often it is asked for. */
  function soon(drawSection) {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(drawSection);
  }

  form("curves")?.addEventListener("change", drawCurves);
  form("windows")?.addEventListener("change", drawWindows);
  form("memory")?.addEventListener("input", () => {
    sayBudget();
    soon(drawMemory);
  });
  document.querySelectorAll("form").forEach((of) => of.addEventListener("submit", (event) => event.preventDefault()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // On paper it is light, whatever the screen is.
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    drawAll();
  });
  if (page.memory) sayBudget();
  drawAll();
})();
