"use strict";
// Draws the curves of a page again, so that they can be asked: the value under the pointer, a linear or a logarithmic
// axis, more or less smoothing, over steps or tokens. Without it, or on paper, the pictures of the page stay.
(() => {
  const SVG = document.querySelector("svg")?.namespaceURI;
  const LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 30;
  const FLAT = 0.01;  // what changes by less than this part of itself is drawn as flat

  const make = (name, attributes, parent) => {
    const drawn = name === "svg" || parent instanceof SVGElement;
    const made = drawn ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  };

  const text = value => {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };

  // As the picture: a centred moving mean over a part of the values.
  const smoothed = (values, part) => {
    const half = Math.floor(values.length * part / 2);
    if (!half) return values;
    return values.map((_, i) => {
      const near = values.slice(Math.max(0, i - half), i + half + 1).filter(value => value !== null);
      return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
    });
  };

  const ticks = (low, high, count) => {
    const raw = (high - low) / count || 1, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(factor => factor * unit).find(size => size >= raw);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
    return found;
  };

  function live(still) {
    const data = JSON.parse(still.dataset.curves), figure = still.closest("figure");
    const counted = JSON.parse(still.closest("[data-tokens]")?.dataset.tokens ?? "[]");
    const [, , width, height] = still.getAttribute("viewBox").split(" ").map(Number);
    const all = data.curves.flatMap(curve => curve.values.filter(value => value !== null));
    const noisy = data.curves.some(curve => curve.noisy);
    const state = {log: data.log, part: 0.025, tokens: false};

    const bar = make("div", {class: "tools"}, figure);
    const button = (name, other, flip) => {
      const made = make("button", {type: "button"}, bar);
      const say = () => { made.textContent = flip() ? other : name; };
      made.addEventListener("click", () => { flip(true); say(); draw(); });
      say();
    };
    if (Math.min(...all) > 0) button("log", "linear", turn => turn ? (state.log = !state.log) : state.log);
    if (counted.length) button("tokens", "steps", turn => turn ? (state.tokens = !state.tokens) : state.tokens);
    if (noisy) {
      const slider = make("input", {type: "range", min: 0, max: 20, value: 2.5, step: 0.5, "aria-label": "smoothing, in percent of the steps"}, bar);
      slider.addEventListener("input", () => { state.part = slider.value / 100; draw(); });
    }
    const shown = make("output", {}, bar);
    const picture = make("svg", {viewBox: `0 0 ${width} ${height}`, class: "live", role: "img", "aria-label": still.getAttribute("aria-label")});
    still.after(picture);
    still.classList.add("still");

    // Tokens read up to a step: [step, tokens], between which a line is drawn.
    const at = step => {
      if (!state.tokens) return step;
      const next = counted.findIndex(point => point[0] >= step);
      if (next < 1) return next ? counted[counted.length - 1][1] : counted[0][1];
      const [a, b] = [counted[next - 1], counted[next]];
      return a[1] + (b[1] - a[1]) * (step - a[0]) / (b[0] - a[0]);
    };

    let x, y, courses;
    const draw = () => {
      picture.replaceChildren();
      const places = data.curves.map(curve => curve.steps.map(at)), flat = places.flat();
      const scale = value => state.log ? Math.log10(value) : value;
      let [low, high] = [Math.min(...all), Math.max(...all)].map(scale);
      const little = Math.abs(high) * FLAT, pad = high - low < little && !state.log ? little : (high - low || 1) * 0.05;
      [low, high] = [low - pad, high + pad];
      const first = Math.min(...flat), last = Math.max(...flat);
      x = place => LEFT + (width - LEFT - RIGHT) * (last > first ? (place - first) / (last - first) : 0.5);
      y = value => height - BOTTOM - (height - TOP - BOTTOM) * (scale(value) - low) / (high - low);
      const label = (value, attributes) => { make("text", attributes, picture).textContent = value; };
      const lines = state.log ? ticks(low, high, 4).map(power => 10 ** power) : ticks(low, high, 4);
      for (const value of lines) {
        make("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}, picture);
        label(text(value), {x: LEFT - 5, y: y(value) + 3, "text-anchor": "end"});
      }
      for (const place of ticks(first, last, width > 500 ? 8 : 4)) {
        label(text(place), {x: x(place), y: height - BOTTOM + 13, "text-anchor": "middle"});
      }
      label(state.tokens ? "tokens" : "step", {x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle"});
      for (const step of data.marks) make("line", {class: "mark", x1: x(at(step)), x2: x(at(step)), y1: TOP, y2: height - BOTTOM}, picture);
      const path = (values, own, attributes) => {
        let pen = "M";
        const points = values.map((value, i) => {
          if (value === null || (state.log && value <= 0)) { pen = "M"; return ""; }
          const piece = `${pen}${x(own[i]).toFixed(1)} ${y(value).toFixed(1)}`;
          pen = "L";
          return piece;
        });
        make("path", {d: points.join(""), ...attributes}, picture);
      };
      courses = data.curves.map((curve, i) => {
        const course = curve.noisy ? smoothed(curve.values, state.part) : curve.values;
        if (curve.noisy && state.part) path(curve.values, places[i], {class: `c${curve.colour} faintly`});
        path(course, places[i], {class: `c${curve.colour} ${curve.dash}`});
        return course;
      });
      make("line", {class: "pointer", y1: TOP, y2: height - BOTTOM, visibility: "hidden"}, picture);
    };

    const ask = event => {
      const box = picture.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
      const near = curve => curve.steps.reduce((best, step, i) => Math.abs(x(at(step)) - place) < Math.abs(x(at(curve.steps[best])) - place) ? i : best, 0);
      const said = data.curves.map((curve, i) => {
        const index = near(curve), value = curve.values[index], course = courses[i][index];
        const mean = course === null || value === null || text(course) === text(value) ? "" : ` (smoothed ${text(course)})`;
        const known = value === null ? "n/a" : text(value) + mean;
        return {step: curve.steps[index], known: curve.name ? `${curve.name} ${known}` : known};
      });
      const line = picture.querySelector(".pointer");
      for (const end of ["x1", "x2"]) line.setAttribute(end, x(at(said[0].step)));
      line.setAttribute("visibility", "visible");
      const where = state.tokens ? `, ${text(at(said[0].step))} tokens` : "";
      shown.textContent = `step ${said[0].step.toLocaleString("en")}${where}: ${said.map(one => one.known).join(" · ")}`;
    };
    picture.addEventListener("pointermove", ask);
    picture.addEventListener("pointerdown", ask);
    draw();
  }

  for (const still of document.querySelectorAll("svg[data-curves]")) live(still);
})();
