// Line charts of the last two minutes, in SVG.

import { element, fixed, setText } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const KEEP_MS = 120_000;
// Reports are up to half a second old, so rates are taken over some of them.
const RATE_MS = 3_000;
const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [320, 128, 34, 6, 18];

const CHARTS = [
  { title: "Requests", digits: 0, series: ["running", "waiting"] },
  { title: "Output, tokens/s", digits: 0, series: ["tokens/s"] },
  { title: "Budget: draft tokens verified a request and pass", digits: 2, series: ["budget"] },
  { title: "Acceptance length: tokens a round", digits: 2, series: ["acceptance"] },
];

export class Charts {
  constructor(parent) {
    this._samples = [];
    this._charts = CHARTS.map((chart) => new Chart(parent, chart));
  }

  add(state, now) {
    const sample = { at: now, totals: totals(state.replicas), values: null };
    this._samples.push(sample);
    while (this._samples[0].at < now - KEEP_MS) this._samples.shift();
    sample.values = this._values(state.replicas, sample);
    this._charts.forEach((chart, index) => {
      const points = this._samples.map(({ at, values }) => [at, values[index]]);
      chart.draw(points, now);
    });
  }

  // One list of values for each chart; null where there is nothing to tell.
  _values(replicas, sample) {
    const sum = (name) => replicas.reduce((all, replica) => all + replica[name], 0);
    const former = this._samples.find(({ at }) => at >= sample.at - RATE_MS);
    const seconds = (sample.at - former.at) / 1000;
    const gained = { tokens: 0, passes: 0, rounds: 0, drafted: 0, accepted: 0 };
    for (const [id, counts] of sample.totals) {
      const before = former.totals.get(id);
      // Another router's report may be older; a replica that is new has no former.
      if (!before || counts.tokens < before.tokens) continue;
      for (const name of Object.keys(gained)) gained[name] += counts[name] - before[name];
    }
    return [
      [sum("num_running"), sum("num_waiting")],
      [seconds > 0 ? gained.tokens / seconds : null],
      [gained.passes > 0 ? gained.drafted / gained.passes : null],
      [gained.rounds > 0 ? 1 + gained.accepted / gained.rounds : null],
    ];
  }
}

function totals(replicas) {
  return new Map(replicas.map(({ replica_id, num_output_tokens, speculation }) => [replica_id, {
    tokens: num_output_tokens,
    passes: speculation.num_steps,
    rounds: speculation.num_drafts,
    drafted: speculation.num_draft_tokens,
    accepted: speculation.num_accepted_tokens,
  }]));
}

class Chart {
  constructor(parent, { title, digits, series }) {
    this._title = title;
    this._digits = digits;
    this._names = series;
    this._now = element("p", { class: "now" }, "nothing yet");
    this._svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
      "aria-label": title });
    const bottom = HEIGHT - BOTTOM;
    this._top = label(LEFT - 4, TOP + 9, "end", "1");
    this._svg.append(
      svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${bottom}H${WIDTH}` }),
      this._top,
      label(LEFT - 4, bottom, "end", "0"),
      label(LEFT, HEIGHT - 4, "start", "−2 min"),
      label(WIDTH, HEIGHT - 4, "end", "now"),
    );
    this._lines = series.map((_, index) => svg("path", { class: place("series", index) }));
    this._dots = series.map((_, index) => svg("circle", { class: place("dot", index), r: 3 }));
    this._svg.append(...this._lines, ...this._dots);
    parent.append(element("figure", {}, element("figcaption", {}, title), this._now, this._svg));
  }

  // `points`: [time, values by series], oldest first.
  draw(points, now) {
    const all = points.flatMap(([, values]) => values).filter((value) => value !== null);
    const top = niceCeiling(Math.max(1, ...all));
    const toX = (at) => LEFT + (WIDTH - LEFT - 4) * (1 - (now - at) / KEEP_MS);
    const toY = (value) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value / top);
    setText(this._top, top.toLocaleString("en", { notation: "compact" }));
    const last = points.at(-1)[1];
    this._lines.forEach((line, series) => {
      let path = "";
      let isOpen = false;
      for (const [at, values] of points) {
        const value = values[series];
        if (value !== null) {
          path += `${isOpen ? "L" : "M"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}`;
        }
        isOpen = value !== null;
      }
      line.setAttribute("d", path);
      const isKnown = last[series] !== null;
      this._dots[series].setAttribute("visibility", isKnown ? "visible" : "hidden");
      this._dots[series].setAttribute("cx", toX(now));
      this._dots[series].setAttribute("cy", toY(last[series] ?? 0));
    });
    const shown = this._names.map((name, series) => {
      const mark = series ? "┅" : "━";
      const value = last[series] === null ? "nothing now" : fixed(last[series], this._digits);
      return this._names.length > 1 ? `${mark} ${name} ${value}` : value;
    }).join("   ");
    setText(this._now, shown);
    this._svg.setAttribute("aria-label", `${this._title}: ${shown}, the axis goes to ${top}`);
  }
}

const place = (name, index) => (index ? `${name} second` : name);

function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function label(x, y, anchor, text) {
  const made = svg("text", { class: "tick", x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

// The next of 1, 2, 5, 10, 20, … above a value.
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}
