"use strict";
// The board's page. It asks its own server only, with the token that is in its address.

const token = new URLSearchParams(location.search).get("token") || "";
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

async function ask(path, body, method) {
  const options = { method: method || (body ? "POST" : "GET"), headers: { Authorization: `Bearer ${token}` } };
  if (body) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) throw new Error(typeof value.error === "string" ? value.error : value.error.message);
  return value;
}

const path = (name) => name.split("/").map(encodeURIComponent).join("/");
const say = (text) => { one("#status").textContent = text; };

/** Runs `work` of a button, which waits meanwhile, and says what went wrong. */
async function busy(button, work) {
  const text = button.textContent;
  button.disabled = true;
  button.textContent = `${text} …`;
  say("");
  try {
    return await work();
  } catch (error) {
    say(error.message);
    throw error;
  } finally {
    button.disabled = false;
    button.textContent = text;
  }
}

// Views

const views = ["runs", "recipe", "rows", "chat"];

function go(view) {
  for (const name of views) {
    const chosen = name === view;
    one(`#${name}`).hidden = !chosen;
    one(`#tab-${name}`).setAttribute("aria-selected", chosen);
    one(`#tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  if (view === "rows") showRows();
  if (view === "runs") drawCharts();
}

for (const [index, name] of views.entries()) {
  const tab = one(`#tab-${name}`);
  tab.addEventListener("click", () => go(name));
  tab.addEventListener("keydown", (event) => {
    const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!turn) return;
    const next = views[(index + turn + views.length) % views.length];
    go(next);
    one(`#tab-${next}`).focus();
  });
}
for (const button of all("[data-go]")) button.addEventListener("click", () => go(button.dataset.go));

// Runs

const COLOURS = 8;
const NOT_DRAWN = new Set(["step", "epoch", "seconds", "tokens", "event", "supervised_tokens"]);
const TITLES = { memory_mb: "memory, MiB", grad_norm: "gradient norm" };
const NOT_NOISY = new Set(["learning_rate", "memory_mb"]);
const chosen = new Map(); // the name of a run whose curves are drawn -> {lines, offset, number}
let known = [];
let readAbout = null;
let told = "";

const numbered = () => {
  const used = new Set([...chosen.values()].map((run) => run.number));
  let number = 0;
  while (used.has(number)) number += 1;
  return number;
};

async function refreshRuns() {
  const answer = await ask("/api/runs");
  const first = !known.length && answer.runs.length;
  known = answer.runs;
  one("#root").textContent = `board of ${answer.root}/`;
  one("#no-runs").hidden = known.length > 0;
  if (first) draw(known[0].name, true);
  const text = JSON.stringify(known) + [...chosen.keys()];
  if (text === told) return;
  told = text;
  const focused = document.activeElement && document.activeElement.id;
  one("#run-list tbody").replaceChildren(...known.map(runLine));
  if (focused && document.getElementById(focused)) document.getElementById(focused).focus();
  const select = one("#ask [name=run]");
  const before = select.value;
  select.replaceChildren(...known.map((run) => element("option", {}, run.name)));
  if (known.some((run) => run.name === before)) select.value = before;
}

function runLine(run, index) {
  const number = (value, digits) => (typeof value === "number" ? value.toPrecision(digits) : "");
  const mark = chosen.has(run.name)
    ? element("span", { class: `k k${chosen.get(run.name).number % COLOURS}` })
    : null;
  const steps = run.step ? run.step + (run.planned ? ` of ${run.planned}` : "") : "";
  return element("tr", {},
    element("td", {}, element("input", {
      type: "checkbox", id: `draw-${index}`, "aria-label": `draw the curves of ${run.name}`,
      checked: chosen.has(run.name), onchange: (event) => draw(run.name, event.target.checked),
    })),
    element("td", {}, mark, element("button", {
      class: "plain", id: `about-${index}`, "aria-current": readAbout === run.name, onclick: () => about(run.name),
    }, run.name)),
    element("td", { class: run.state.replace(" ", "-") }, run.state),
    element("td", {}, run.trainer || ""),
    element("td", { class: "n" }, steps),
    element("td", { class: "n" }, number(run.loss, 4)),
    element("td", {}, run.model || ""));
}

async function draw(name, wanted) {
  if (wanted) chosen.set(name, { lines: [], offset: 0, number: numbered() });
  else chosen.delete(name);
  told = "";
  await refreshLines();
  await refreshRuns();
  drawCharts();
}

async function refreshLines() {
  let changed = false;
  for (const [name, run] of chosen) {
    const { offset } = run;
    const answer = await ask(`/api/lines/${path(name)}?offset=${offset}`);
    if (run.offset !== offset) continue; // another request was faster
    if (answer.anew) run.lines = [];
    run.lines.push(...answer.lines);
    run.offset = answer.offset;
    changed = changed || answer.anew || answer.lines.length > 0;
  }
  return changed;
}

/** All metrics of the chosen runs: name -> curves. Losses come first, together. */
function curves() {
  const axis = one("#view [name=x]").value;
  const found = new Map();
  for (const [name, run] of chosen) {
    let tokens = 0;
    let seconds = 0;
    const own = new Map();
    for (const line of run.lines) {
      if (typeof line.loss === "number" && typeof line.tokens === "number") tokens += line.tokens;
      if (typeof line.seconds === "number") seconds = line.seconds;
      const x = axis === "tokens" ? tokens : axis === "seconds" ? seconds : line.step;
      for (const [key, value] of Object.entries(line)) {
        if (NOT_DRAWN.has(key) || typeof value !== "number" || /_(runtime|samples_per_second|steps_per_second)$/.test(key)) continue;
        if (!own.has(key)) own.set(key, []);
        own.get(key).push([x, value]);
      }
    }
    for (const [key, points] of own) {
      const isEval = key.startsWith("eval_");
      const chart = key === "eval_loss" ? "loss" : key;
      if (!found.has(chart)) found.set(chart, []);
      const label = key === "eval_loss" ? `${name}, evaluation` : name;
      found.get(chart).push({ label, number: run.number, points, noisy: !isEval && !NOT_NOISY.has(key), dashed: isEval && chart === "loss" });
    }
  }
  const order = (name) => (name === "loss" ? 0 : name.startsWith("eval_") ? 1 : name.startsWith("rewards") ? 2 : 3);
  return [...found].sort(([a], [b]) => order(a) - order(b) || (a < b ? -1 : 1));
}

function drawCharts() {
  if (one("#runs").hidden) return;
  one("#legend").replaceChildren(...[...chosen].map(([name, run]) =>
    element("span", {}, element("span", { class: `k k${run.number % COLOURS}` }), name)));
  const view = one("#view");
  const form = { smooth: Number(view.smooth.value), log: view.log.checked, axis: view.x.selectedOptions[0].text };
  one("#charts").replaceChildren(...curves().map(([name, series], index) => chart(name, series, form, index === 0)));
}

/** Exponential moving average, unbiased at the beginning. */
function smoothed(points, share) {
  let sum = 0;
  let weight = 0;
  return points.map(([x, y]) => {
    sum = share * sum + (1 - share) * y;
    weight = share * weight + (1 - share);
    return [x, sum / weight];
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, i) => (first + i) * step);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  if (found.length < 2) return ticks(low, high, 5);
  return found.length > 7 ? found.filter((value) => Number.isInteger(Math.round(1e9 * Math.log10(value)) / 1e9)) : found;
}

function shortly(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size && size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function chart(name, series, form, large) {
  const wide = large && window.innerWidth > 700;
  const W = wide ? 1000 : 480;
  const H = wide ? 330 : 220;
  const [left, right, top, bottom] = [56, 12, 8, 34];
  const logarithmic = form.log && series.every(({ points }) => points.every(([, y]) => y > 0));
  const lines = series.map((one) => ({ ...one, smooth: one.noisy ? smoothed(one.points, form.smooth) : one.points }));
  const xs = lines.flatMap(({ points }) => points.map(([x]) => x));
  const ys = lines.flatMap(({ points }) => points.map(([, y]) => y));
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const least = 0.02 * Math.max(Math.abs(y0), Math.abs(y1)) || 1; // a flat course is drawn flat
  if (logarithmic && y0 === y1) [y0, y1] = [y0 / 2, y1 * 2];
  else if (!logarithmic && y1 - y0 < least) [y0, y1] = [(y0 + y1 - least) / 2, (y0 + y1 + least) / 2];
  const scale = logarithmic ? Math.log10 : (value) => value;
  const px = (x) => left + (x1 === x0 ? 0.5 : (x - x0) / (x1 - x0)) * (W - left - right);
  const py = (y) => H - bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (H - top - bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0",
    "aria-label": `${name} over ${form.axis}; the arrow keys move from value to value` });
  for (const value of logarithmic ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: W - right, y1: py(value), y2: py(value) }),
      drawn("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, shortly(value)));
  }
  for (const value of ticks(x0, x1, wide ? 8 : 4)) {
    svg.append(drawn("text", { x: px(value), y: H - bottom + 16, "text-anchor": "middle" }, shortly(value)));
  }
  svg.append(drawn("text", { x: (left + W - right) / 2, y: H - 3, "text-anchor": "middle" }, form.axis));
  const along = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
  for (const line of lines) {
    const colour = `c${line.number % COLOURS}${line.dashed ? " dashed" : ""}`;
    if (line.noisy && form.smooth > 0) svg.append(drawn("path", { class: `${colour} raw`, d: along(line.points) }));
    svg.append(drawn("path", { class: colour, d: along(line.smooth) }));
  }
  const cursor = drawn("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);
  const shown = element("output", {});
  const steps = [...new Set(xs)].sort((a, b) => a - b);
  let at = steps.length - 1;
  const point = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const x = steps[at];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(x));
    cursor.setAttribute("visibility", "visible");
    const values = lines.map((line) => {
      const near = line.points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
      return `${line.label}: ${shortly(near[1])}`;
    });
    shown.textContent = `${form.axis} ${shortly(x)} — ${values.join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * W - left) / (W - left - right) * (x1 - x0);
    point(steps.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(steps[best] - x) ? i : best), 0));
  });
  svg.addEventListener("keydown", (event) => {
    const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (turn) { event.preventDefault(); point(at + turn); }
  });
  return element("figure", { class: "chart" }, element("figcaption", {}, element("b", {}, TITLES[name] || words(name))), svg, shown);
}

async function about(name) {
  readAbout = name;
  told = "";
  refreshRuns();
  const run = await ask(`/api/run/${path(name)}`);
  const facts = element("dl", {});
  for (const [key, value] of run.facts) facts.append(element("dt", {}, key), element("dd", {}, value));
  const parts = [
    element("h2", {}, name),
    element("p", { class: "bar-form" },
      element("a", { href: `/report/${path(name)}?token=${encodeURIComponent(token)}`, target: "_blank", rel: "noopener" }, "Report"),
      element("button", { onclick: () => { one("#ask [name=run]").value = name; go("chat"); } }, "Chat with it"),
      run.recipe ? element("button", { onclick: () => { setText(run.recipe); go("recipe"); } }, "Its recipe") : null),
    facts,
  ];
  if (run.events.length) {
    parts.push(element("h3", {}, "Events"),
      element("ul", {}, ...run.events.map(({ step, event }) => element("li", {}, `step ${step}: ${event}`))));
  }
  if (run.answers.length) parts.push(...answersOf(run.answers));
  if (run.examples) {
    parts.push(element("h3", {}, "Hardest rows"), element("p", { class: "faint" }, "The highest loss per token in the last pass over the data: often mistakes in the data."));
    for (const example of run.examples.hardest) parts.push(exampleOf(example, run.recipe));
  }
  one("#details").replaceChildren(...parts);
}

/** The answers to each fixed prompt, over the steps. */
function answersOf(answers) {
  const byPrompt = new Map();
  for (const answer of answers) {
    if (!byPrompt.has(answer.prompt)) byPrompt.set(answer.prompt, []);
    byPrompt.get(answer.prompt).push(answer);
  }
  const parts = [element("h3", {}, "Answers over time")];
  for (const [prompt, list] of byPrompt) {
    const boxes = list.map((answer) => element("div", { class: `text${answer.answer === answer.expected ? " same" : ""}` },
      element("small", {}, `step ${answer.step}`), element("pre", {}, answer.answer)));
    if (list[0].expected) boxes.push(element("div", { class: "text" }, element("small", {}, "expected"), element("pre", {}, list[0].expected)));
    parts.push(element("details", { open: byPrompt.size <= 3 }, element("summary", {}, prompt.slice(0, 120)),
      element("div", { class: "answers" }, ...boxes)));
  }
  return parts;
}

function exampleOf(example, recipe) {
  const text = element("pre", {}, ...example.parts.map(([part, supervised]) => (supervised ? element("b", {}, part) : part)));
  const words = example.parts.map(([part]) => part).join("").split("\n").filter((line) => line.length > 12 && !line.startsWith("<"));
  const find = recipe && words.length
    ? element("button", { onclick: () => { setText(recipe); findRow(words[0].slice(0, 60)); } }, "Find it among the rows")
    : null;
  return element("div", { class: "row" },
    element("small", {}, `loss ${example.loss.toFixed(3)}, usually ${example.usual.toFixed(3)}, step ${example.step} `), find, text);
}

one("#view").addEventListener("input", drawCharts);
one("#view").addEventListener("submit", (event) => event.preventDefault());

// Recipes

let schema = null;
let checking = null;

async function refreshRecipes(name) {
  const answer = await ask("/api/recipes");
  const select = one("#recipes");
  const before = name || select.value;
  select.replaceChildren(element("option", { value: "" }, "choose"), ...answer.recipes.map((recipe) => element("option", {}, recipe)));
  if (answer.recipes.includes(before)) select.value = before;
}

function setText(text) {
  one("#text").value = text;
  checkText();
}

async function openRecipe(name) {
  setText((await ask(`/api/recipe/${encodeURIComponent(name)}`)).text);
}

async function checkText() {
  const problem = one("#problem");
  const text = one("#text").value;
  if (!text.trim()) { problem.textContent = ""; return; }
  try {
    const { error } = await ask("/api/check", { text });
    if (text !== one("#text").value) return;
    problem.textContent = error || "No mistake in the settings.";
    problem.className = error ? "" : "fine";
  } catch (error) {
    problem.textContent = error.message;
    problem.className = "";
  }
}

/** The help of the key on the cursor's line, or the keys that begin like it. */
async function help() {
  schema = schema || await ask("/api/schema");
  const box = one("#text");
  const line = box.value.slice(box.value.lastIndexOf("\n", box.selectionStart - 1) + 1).split("\n", 1)[0];
  const key = (line.match(/^[a-z_0-9]+/) || [""])[0];
  const keys = schema.properties;
  let text = "";
  if (keys[key]) text = `${key}: ${keys[key].description}`;
  else if (key) text = Object.keys(keys).filter((name) => name.startsWith(key)).slice(0, 12).join("  ");
  one("#help").textContent = text;
}

one("#text").addEventListener("input", () => {
  clearTimeout(checking);
  checking = setTimeout(checkText, 400);
});
for (const kind of ["keyup", "click"]) one("#text").addEventListener(kind, () => help().catch((error) => say(error.message)));
one("#recipes").addEventListener("change", (event) => event.target.value && openRecipe(event.target.value));
one("#new").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const name = form.name.value;
  busy(one("button", form), async () => {
    const output = `runs/${name.replace(/\.ya?ml$/, "")}`;
    await ask("/api/init", { data: form.data.value, model: form.model.value, name, output });
    await refreshRecipes(name);
    await openRecipe(name);
  }).catch(() => {});
});

function recipeName() {
  const name = one("#recipes").value || one("#new [name=name]").value;
  if (!name) throw new Error("give the recipe a name");
  return name;
}

async function saveRecipe() {
  const name = recipeName();
  await ask(`/api/recipe/${encodeURIComponent(name)}`, { text: one("#text").value }, "PUT");
  await refreshRecipes(name);
  say(`saved ${name}`);
  return name;
}

one("#save").addEventListener("click", (event) => busy(event.target, saveRecipe).catch(() => {}));
one("#train").addEventListener("click", (event) => busy(event.target, async () => {
  const name = await saveRecipe();
  await ask(`/api/train/${encodeURIComponent(name)}`, {});
  say(`training of ${name} has started`);
  await refreshJobs();
}).catch(() => {}));
for (const command of ["check", "plan"]) {
  one(`#${command}`).addEventListener("click", (event) => busy(event.target, async () => {
    const { text } = await ask("/api/look", { command, text: one("#text").value });
    one("#looked").replaceChildren(element("pre", { class: "output tall", tabindex: "0" }, text));
  }).catch((error) => one("#looked").replaceChildren(element("p", { class: "warn" }, error.message))));
}
one("#show-rows").addEventListener("click", () => go("rows"));

const words = (key) => key.replaceAll("_", " ");

async function refreshJobs() {
  const { jobs } = await ask("/api/jobs");
  if (!jobs.length) return;
  one("#jobs").replaceChildren(...jobs.map((job) => element("div", {},
    element("h3", {}, `${job.number}: ${job.name} `, element("small", {}, job.running ? "running" : job.code === 0 ? "done" : `ended with code ${job.code}`)),
    job.running ? element("button", { onclick: (event) => busy(event.target, () => ask(`/api/stop/${job.number}`, {})).catch(() => {}) }, "Stop and save") : null,
    element("pre", { class: "output", tabindex: "0" }, job.output))));
}

// Rows

async function showRows(search) {
  const form = one("#search");
  const text = one("#text").value;
  if (!text.trim()) { one("#about").textContent = "Choose or write a recipe first."; return; }
  one("#about").textContent = "Reading the rows …";
  try {
    const wanted = { text, first: Number(form.first.value), search: search ?? form.text.value };
    const answer = await ask("/api/rows", wanted);
    one("#about").textContent = answer.about;
    one("#shown").innerHTML = answer.html; // made and escaped by the server's inspect view
  } catch (error) {
    one("#about").textContent = error.message;
    one("#shown").replaceChildren();
  }
}

function findRow(text) {
  one("#search").text.value = text;
  go("rows");
}

one("#search").addEventListener("submit", (event) => { event.preventDefault(); showRows(); });
for (const [name, turn] of [["earlier", -5], ["later", 5]]) {
  one(`#search [name=${name}]`).addEventListener("click", () => {
    const form = one("#search");
    form.text.value = "";
    form.first.value = Math.max(1, Number(form.first.value) + turn);
    showRows();
  });
}

// Chat

let said = []; // [{user, run, base}]

async function answerInto(box, body) {
  const response = await fetch("/api/chat", {
    method: "POST",
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  if (!response.ok) {
    box.textContent = (await response.json()).error;
    box.classList.add("warn");
    return null;
  }
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  box.textContent = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return box.textContent;
    box.textContent += decoder.decode(value, { stream: true });
  }
}

one("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const message = one("#message");
  const user = message.value.trim();
  if (!user) return;
  busy(one("button.main", form), async () => {
    const turn = { user };
    const sides = form.base.checked ? [["run", false], ["base", true]] : [["run", false]];
    const boxes = new Map(sides.map(([side]) => [side, element("pre", {}, "…")]));
    one("#talk").append(element("p", {}, element("b", {}, user)), element("div", { class: "answers two" },
      ...sides.map(([side]) => element("div", { class: "text" },
        element("small", {}, side === "run" ? form.run.value : "its base model"), boxes.get(side)))));
    message.value = "";
    for (const [side, base] of sides) {
      const system = one("#system").value.trim();
      const messages = system ? [{ role: "system", content: system }] : [];
      for (const earlier of said) {
        if (earlier[side]) messages.push({ role: "user", content: earlier.user }, { role: "assistant", content: earlier[side] });
      }
      messages.push({ role: "user", content: user });
      turn[side] = await answerInto(boxes.get(side), {
        run: form.run.value, base, messages, temperature: Number(form.temperature.value), max_tokens: Number(form.tokens.value),
      });
    }
    said.push(turn);
  }).catch(() => {});
});
one("#message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); one("#ask").requestSubmit(); }
});
const anew = () => { said = []; one("#talk").replaceChildren(); };
one("#ask [name=anew]").addEventListener("click", anew);
one("#ask [name=run]").addEventListener("change", anew);

// As time goes by

async function look() {
  try {
    await refreshRuns();
    if (await refreshLines()) drawCharts();
    if (!one("#recipe").hidden) await refreshJobs();
    if (one("#status").textContent.startsWith("The board")) say("");
  } catch (error) {
    say(error instanceof TypeError ? "The board does not answer; is it still running?" : error.message);
  }
  setTimeout(look, document.hidden ? 10000 : 2000);
}

refreshRecipes().catch((error) => say(error.message));
look();
