// The live page: asks for /history every two seconds and shows what it says.
"use strict";

const EVERY_MS = 2000;
const ROWS = 8; // of a table
const at = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const figure = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const count = (value) => (value === null ? "–" : value.toLocaleString("en"));
const last = (values) => (values.length ? values[values.length - 1] : null);

let run = null; // the newest answer
const charts = {}; // by id of their place

// ---- asking ---------------------------------------------------------------------------------------------------------

async function ask() {
  const key = sessionStorage.getItem("key");
  let answer, text = "live";
  try {
    answer = await fetch("history", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    if (answer.ok) run = await answer.json();
    else text = `the server answers with status ${answer.status}`;
  } catch (error) {
    text = error instanceof SyntaxError ? "the server's answer is not JSON" : "the server does not answer";
  }
  if (answer?.status === 401) {
    askForKey(key !== null);
    return;
  }
  try {
    if (text === "live") show();
  } catch (error) {
    console.error(error);
    text = "the server answers, but its figures cannot be drawn";
  }
  setText("connection", text);
  at("connection").className = text === "live" ? "" : "lost";
  setTimeout(ask, EVERY_MS);
}

function askForKey(wrong) {
  setText("connection", wrong ? "this key is not known to the server" : "a key is needed");
  at("connection").className = wrong ? "lost" : "";
  sessionStorage.removeItem("key");
  at("run").hidden = true;
  at("key-form").hidden = false;
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  ask();
});

// ---- figures and tables ---------------------------------------------------------------------------------------------

function setText(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text; // an equal text would be read out again
}

function show() {
  const { points, learner } = run;
  at("run").hidden = false;
  setText("model", run.model);
  setText("requests", count(run.requests));
  setText("running", count(run.num_running));
  setText("waiting", count(run.num_waiting));
  setText("acceptance", figure(last(points.acceptance)));
  const speedup = last(points.speedup);
  setText("speedup", speedup === null ? (tooShort() ? "too short" : "–") : `${figure(speedup)}×`);
  setText("plain", figure(last(points.plain), 1));
  setText("speculative", figure(last(points.speculative), 1));
  setText("version", run.version === null ? "–" : String(run.version));
  const shares = Object.entries(run.drafted).map(([name, share]) => `${name} ${Math.round(100 * share)}%`);
  setText("drafted", shares.join(" · ") || "nothing: no round was decoded");

  const elsewhere = learner.state.startsWith("any at "); // a learner that was not started here
  at("learner-figures").hidden = elsewhere;
  at("elsewhere").hidden = !elsewhere;
  setText("learner-state", `State: ${learner.state}`);
  setText("steps", count(learner.steps));
  setText("seen", count(learner.seen));
  setText("to-learn", count(learner.waiting));
  setText("loss", figure(learner.loss, 3));
  setText("skipped", count(learner.skipped));
  setText("restarts", count(learner.restarts));

  const { gates, swaps, verdicts, faults } = run;
  rows("gates", gates.time.map((_, i) => [
    count(gates.requests[i]),
    signed(gates.difference[i]),
    gates.interval[i].map(signed).join(" to "),
    gates.publish[i] ? `published as ${gates.version[i]}` : "refused",
  ]).slice(-ROWS).reverse());
  rows("verdicts", verdicts.time.map((_, i) => [
    String(verdicts.version[i]),
    count(verdicts.requests[i]),
    verdicts.acceptance_length[i].map((value) => figure(value)).join(" → "),
    verdicts.tokens_per_second[i].map((value) => figure(value, 1)).join(" → "),
    `${verdicts.promote[i] ? "promoted" : "rolled back"}: ${verdicts.reason[i]}`,
  ]).slice(-ROWS).reverse());
  const none = verdicts.time.length ? "No weights are on trial now." : "No weights were tried yet.";
  setText("on-trial", run.on_trial === null ? none : `Version ${run.on_trial} is on trial.`);
  at("faulty").hidden = faults.time.length === 0;
  rows("faults", faults.time.map((_, i) => [
    String(faults.version[i]),
    count(faults.requests[i]),
    faults.cause[i],
    faults.detail[i],
    faults.action[i],
  ]).slice(-ROWS).reverse());
  rows("swaps", swaps.time.map((time, i) => [
    String(swaps.version[i]),
    count(swaps.requests[i]),
    new Date(1000 * time).toLocaleTimeString(),
    `${figure(swaps.ms[i], 1)} ms`,
  ]).slice(-ROWS).reverse());
  at("no-gates").hidden = gates.time.length > 0;
  setText("no-gates", elsewhere ? at("elsewhere").textContent : "No candidate was judged yet.");
  at("no-swaps").hidden = swaps.time.length > 0;
  at("swaps-note").hidden = swaps.time.length === 0;
  draw();
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function rows(id, content) {
  const text = JSON.stringify(content);
  if (at(id).dataset.text === text) return; // what is selected stays so
  at(id).dataset.text = text;
  at(id).hidden = content.length === 0;
  at(id).tBodies[0].replaceChildren(...content.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
}

// ---- charts ---------------------------------------------------------------------------------------------------------

function draw() {
  const { points, gates } = run;
  const axis = document.querySelector("input[name=axis]:checked").value;
  const served = series(points[axis], points.acceptance);
  const replayed = series(gates[axis], gates.serving);
  const speedup = series(points[axis], points.speedup);
  chart("acceptance-chart", axis, uPlot.join([served, replayed]), [
    { label: "served", color: "--served" },
    { label: "gate's replay of the serving weights", color: "--gate", dots: true },
  ]);
  chart("speedup-chart", axis, speedup, [{ label: "speculative / plain", color: "--speed" }]);
  setText("acceptance-text", told(points.acceptance, "No request with drafts has completed yet."));
  setText("speedup-text", told(points.speedup, noSpeedup()));
}

// Whether there were plain rounds, but too few of them for a speedup.
function tooShort() {
  const rounds = last(run.points.baseline_rounds);
  return rounds > 0 && rounds < run.min_baseline_rounds;
}

function noSpeedup() {
  const rounds = last(run.points.baseline_rounds);
  if (!rounds) return "No plain rounds in the last quarter: no baseline window there, or baseline.share=0.";
  if (!tooShort()) return "No speculative rounds were measured.";
  return `The baseline windows are too short: ${rounds} of ${run.min_baseline_rounds} plain rounds.`;
}

// Points of equal requests are one; the last counts.
function series(xs, ys) {
  const keep = xs.map((_, i) => i).filter((i) => i === xs.length - 1 || xs[i] !== xs[i + 1]);
  return [keep.map((i) => xs[i]), keep.map((i) => ys[i])];
}

// What a chart shows, for those who do not see it.
function told(values, missing) {
  const known = values.filter((value) => value !== null);
  if (!known.length || last(values) === null) return missing;
  return `${figure(known[0])} at first, ${figure(last(known))} now.`;
}

function chart(id, axis, data, lines) {
  const place = at(id);
  const known = data.slice(1).some((ys) => ys.some((y) => y != null));
  if (!known) {
    clear(id); // the server has started anew
    return;
  }
  if (charts[id]) {
    charts[id].setData(data);
    return;
  }
  const grid = { stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
  const options = {
    width: place.clientWidth,
    height: 220,
    padding: [8, 16, 0, 8],
    scales: { x: { time: axis === "time" } },
    axes: [grid, { ...grid, size: 45 }],
    series: [
      { label: axis === "time" ? "time" : "requests" },
      ...lines.map(({ label, color, dots }) => ({
        label,
        stroke: css(color),
        width: 2,
        value: (_, y) => (y == null ? "–" : figure(y)),
        ...(dots ? { paths: () => null, points: { show: true, size: 7, fill: css(color) } } : {}),
      })),
    ],
    hooks: { draw: [drawSwaps] },
  };
  charts[id] = new uPlot(options, data, place);
}

function drawSwaps(plot) {
  const axis = document.querySelector("input[name=axis]:checked").value;
  const { left, top, width, height } = plot.bbox;
  const pen = plot.ctx;
  pen.save();
  pen.strokeStyle = css("--swap");
  pen.setLineDash([4, 4]);
  pen.beginPath();
  for (const swap of run.swaps[axis]) {
    const x = Math.round(plot.valToPos(swap, "x", true));
    if (x < left || x > left + width) continue;
    pen.moveTo(x, top);
    pen.lineTo(x, top + height);
  }
  pen.stroke();
  pen.restore();
}

function clear(id) {
  charts[id]?.destroy();
  delete charts[id];
}

function redraw() {
  Object.keys(charts).forEach(clear);
  if (run) draw();
}

document.querySelectorAll("input[name=axis]").forEach((input) => input.addEventListener("change", redraw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", () => {
  for (const [id, plot] of Object.entries(charts)) plot.setSize({ width: at(id).clientWidth, height: 220 });
});
ask();
