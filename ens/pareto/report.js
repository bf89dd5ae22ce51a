"use strict";
// Draws charts, the chosen hybrid and the slot map from the JSON in #state; sizes are pixels, drawn anew on a resize.
const at = id => document.getElementById(id);
const state = JSON.parse(at("state").textContent);
const maker = namespace => (name, attributes = {}, ...children) => {
  const node = document.createElementNS(namespace, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  node.append(...children);
  return node;
};
const svg = maker("http://www.w3.org/2000/svg"), html = maker("http://www.w3.org/1999/xhtml");
const quality = state.objectives.findIndex(one => one.quality);
let view = state.views[0], chosen = view.members[view.knee], drawn = [];

// ---- axes

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough * .999);
  const values = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high * (1 + 1e-9); index++) values.push(index * step);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return {step, values, largest};
}

function numeral(value, {step, largest}, si) {
  const [scale, letter] = si && [[1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([size]) => largest >= size) || [1, ""];
  const digits = Math.max(0, -Math.floor(Math.log10(step / scale) + 1e-9));
  return (value / scale).toFixed(Math.min(digits, 6)).replace(/^-(0(\.0*)?)$/, "$1") + letter;
}

// Grid, ticks and titles of a chart whose axes are {label, si, low, high}; returns how values become pixels.
function drawAxes(chart, xAxis, yAxis) {
  const width = Math.max(200, chart.clientWidth), height = chart.clientHeight;  // 0 while the page is not laid out
  const across = ticks(xAxis.low, xAxis.high, Math.max(3, width / 110)), up = ticks(yAxis.low, yAxis.high, height / 70);
  const texts = up.values.map(value => numeral(value, up, yAxis.si));
  const left = 30 + 7 * Math.max(...texts.map(text => text.length)), right = width - 16, top = 22, bottom = height - 44;
  const x = value => left + (value - xAxis.low) / (xAxis.high - xAxis.low) * (right - left);
  const y = value => bottom - (value - yAxis.low) / (yAxis.high - yAxis.low) * (bottom - top);
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren();
  across.values.forEach(value => chart.append(
    svg("line", {class: "grid", x1: x(value), x2: x(value), y1: top, y2: bottom}),
    svg("text", {x: x(value), y: bottom + 18, "text-anchor": "middle"}, numeral(value, across, xAxis.si))));
  up.values.forEach((value, index) => chart.append(
    svg("line", {class: "grid", x1: left, x2: right, y1: y(value), y2: y(value)}),
    svg("text", {x: left - 7, y: y(value) + 4, "text-anchor": "end"}, texts[index])));
  chart.append(
    svg("line", {class: "axis", x1: left, x2: right, y1: bottom, y2: bottom}),
    svg("line", {class: "axis", x1: left, x2: left, y1: top, y2: bottom}),
    svg("text", {x: (left + right) / 2, y: height - 6, "text-anchor": "middle"}, xAxis.label),
    svg("text", {transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, yAxis.label));
  return {x, y, left, right, top, bottom};
}

function limits(values) {
  const low = Math.min(...values), high = Math.max(...values), margin = (high - low || Math.abs(high) || 1) * .05;
  return {low: low - margin, high: high + margin};
}

// ---- the front

const star = (x, y, radius) => Array.from({length: 10}, (_, index) => {
  const angle = Math.PI * (index / 5 - .5), reach = index % 2 ? radius * .45 : radius;
  return `${x + reach * Math.cos(angle)},${y + reach * Math.sin(angle)}`;
}).join(" ");
const diamond = (x, y, size) => `${x},${y - size} ${x + size},${y} ${x},${y + size} ${x - size},${y}`;
const triangle = (x, y, size) => `${x},${y - size} ${x + size},${y + .8 * size} ${x - size},${y + .8 * size}`;
const shapes = {
  measured: (x, y) => svg("circle", {class: "measured", cx: x, cy: y, r: 3}),
  member: (x, y) => svg("circle", {class: "member", cx: x, cy: y, r: 5}),
  near: (x, y) => svg("circle", {class: "near", cx: x, cy: y, r: 8}),
  knee: (x, y) => svg("polygon", {class: "knee", points: star(x, y, 11)}),
  teacher: (x, y) => svg("polygon", {class: "teacher", points: diamond(x, y, 7)}),
  tuned: (x, y) => svg("polygon", {class: "tuned", points: triangle(x, y, 7)}),
  input: (x, y) => svg("line", {class: "input", x1: x - 11, x2: x + 11, y1: y, y2: y}),
};

// Cividis, from few to many: readable for colour-blind people, in light and dark.
function shade(share) {
  const stops = [[32, 76, 156], [124, 123, 120], [250, 215, 70]], place = share * 2, index = Math.min(1, Math.floor(place));
  return `rgb(${stops[index].map((from, channel) => Math.round(from + (stops[index + 1][channel] - from) * (place - index)))})`;
}

function drawFront() {
  const {x: across, y: up, colour, members} = view, chart = at("front"), range = at("range").value;
  const onFront = new Set(members), upwards = up === quality, teacher = [state.teacher[across], state.teacher[up]];
  const taught = teacher.every(Number.isFinite), spots = members.map(number => state.items[number].values);
  const tuned = upwards ? state.items.filter(item => item.tuned_drop !== undefined) : [];
  const core = range === "all" ? state.items.map(item => item.values) : range === "front" ? spots
    : spots.filter((_, index) => view.roles[index]);
  const xs = [...core.map(values => values[across]), ...(taught ? [teacher[0]] : [])];
  const ys = [...core.map(values => values[up]), ...(taught ? [teacher[1]] : []), ...tuned.map(item => item.tuned_drop)];
  if (range === "all" && upwards && state.input !== null) ys.push(state.input);
  const axis = (index, values) => ({...state.objectives[index], ...limits(values)});
  const xAxis = axis(across, xs), yAxis = axis(up, ys), plot = drawAxes(chart, xAxis, yAxis);
  const inside = (x, y) => x >= xAxis.low && x <= xAxis.high && y >= yAxis.low && y <= yAxis.high;
  const mark = (x, y, text, shift = -13) => svg("text", {class: "mark", x, y: y + shift, "text-anchor":
    x > plot.right - 60 ? "end" : x < plot.left + 40 ? "start" : "middle"}, text);
  const used = new Set(["measured", "member", "knee"]), above = [];
  drawn = [];
  const place = (item, kind) => {
    const x = plot.x(item.values[across]), y = plot.y(item.values[up]);
    if (inside(item.values[across], item.values[up])) drawn.push({x, y, item, kind});
    return inside(item.values[across], item.values[up]) ? [x, y] : null;
  };

  if (upwards && state.input !== null) {
    used.add("input");
    const text = `degraded input, ${state.input.toFixed(2)} dB`;
    if (inside(xAxis.low, state.input)) {
      chart.append(svg("line", {class: "input", x1: plot.left, x2: plot.right, y1: plot.y(state.input), y2: plot.y(state.input)}));
      above.push(svg("text", {class: "mark", x: plot.right, y: plot.y(state.input) - 6, "text-anchor": "end"}, text));
    } else above.push(svg("text", {class: "mark", x: plot.right, y: 14, "text-anchor": "end"}, `↑ ${text}`));
  }
  let beyond = 0;
  state.items.forEach((item, number) => {
    if (onFront.has(number)) return;
    const spot = place(item, "measured");
    if (spot) chart.append(shapes.measured(...spot));
    else beyond++;
  });
  if (colour === null) {
    const steps = spots.map(values => [plot.x(values[across]), plot.y(values[up])]).sort((one, other) => one[0] - other[0]);
    chart.append(svg("path", {class: "line", "clip-path": "url(#inner)", d: steps.map(([x, y], index) => index ? `H${x}V${y}` : `M${x},${y}`).join("")}));
  }
  chart.append(svg("clipPath", {id: "inner"}, svg("rect", {x: plot.left, y: plot.top, width: plot.right - plot.left, height: plot.bottom - plot.top})));
  const third = colour === null ? null : {low: Math.min(...spots.map(values => values[colour])), high: Math.max(...spots.map(values => values[colour]))};
  members.forEach((number, index) => {
    const item = state.items[number], spot = place(item, "member");
    if (!spot) return;
    const [x, y] = spot, error = upwards ? view.errors[index] / (yAxis.high - yAxis.low) * (plot.bottom - plot.top) : 0;
    if (error > 1) chart.append(svg("path", {class: "error", "clip-path": "url(#inner)", d: `M${x - 3},${y - error}h6m-3,0V${y + error}m-3,0h6`}));
    const point = svg("g", {id: `member-${number}`, class: "point", role: "option", "aria-label": describe(item, view.roles[index])}, shapes.member(x, y));
    if (third) point.firstChild.style.fill = shade((item.values[colour] - third.low) / (third.high - third.low || 1));
    chart.append(point);
    if (index === view.knee) above.push(shapes.knee(x, y), mark(x, y, "knee"));
    else if (view.roles[index]) {
      used.add("near");
      above.unshift(shapes.near(x, y));
    }
  });
  tuned.forEach(item => {
    const x = plot.x(item.values[across]), y = plot.y(item.tuned_drop), from = plot.y(item.values[up]);
    if (!inside(item.values[across], item.tuned_drop)) return;
    used.add("tuned");
    chart.append(svg("line", {class: "gain", "clip-path": "url(#inner)", x1: x, x2: x, y1: from, y2: y}), shapes.tuned(x, y));
    drawn.push({x, y, item, kind: "tuned"});
  });
  if (taught) {
    used.add("teacher");
    const [x, y] = [plot.x(teacher[0]), plot.y(teacher[1])];
    chart.append(shapes.teacher(x, y));
    above.push(mark(x, y, "teacher"));
  }
  chart.append(...above, svg("circle", {class: "ring", id: "ring", r: 13}));
  const names = {measured: "measured", member: "front, before fine-tuning", near: "nearest to the knee", knee: "knee",
    tuned: "fine-tuned", teacher: "teacher", input: "degraded input"};
  at("marks").replaceChildren(...Object.keys(names).filter(name => used.has(name)).map(name =>
    html("li", {}, svg("svg", {viewBox: "0 0 22 16", "aria-hidden": "true"}, shapes[name](11, 8)), names[name])));
  if (third) {
    const {label, si} = state.objectives[colour], scale = {step: (third.high - third.low) / 100 || 1, largest: third.high};
    const bar = html("i", {style: `width:60px;background:linear-gradient(90deg,${[0, .5, 1].map(shade)})`});
    at("marks").append(html("li", {}, bar, `${label}: ${numeral(third.low, scale, si)} to ${numeral(third.high, scale, si)}`));
  }
  const left = state.measured - state.items.length;
  at("beyond").hidden = !(beyond || left);
  at("beyond").textContent = [beyond && `${beyond} of ${state.measured} measured hybrids lie outside this range.`,
    left && `${left} of ${state.measured}, none of the front, are left out to keep the page fast.`].filter(Boolean).join(" ");
  moveRing();
}

function moveRing() {
  const place = drawn.find(point => point.item === state.items[chosen] && point.kind !== "tuned");
  at("ring").setAttribute("visibility", place ? "visible" : "hidden");
  if (place) at("ring").setAttribute("transform", `translate(${place.x} ${place.y})`);
  at("front").querySelectorAll(".point").forEach(point => point.setAttribute("aria-selected", point.id === `member-${chosen}`));
  at("front").setAttribute("aria-activedescendant", `member-${chosen}`);
}

const describe = (item, role) => [role, item.genotype,
  ...item.texts.map((text, index) => `${state.objectives[index].label} ${text}`)].filter(Boolean).join(", ");

function nearest(event, reach) {
  const box = at("front").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const far = point => Math.hypot(point.x - x, point.y - y) - (point.kind === "measured" ? 0 : 4);
  const best = drawn.reduce((best, point) => far(point) < far(best) ? point : best, drawn[0]);
  return best && far(best) < reach ? best : null;
}

function showTip(point) {
  const tip = at("tip");
  tip.hidden = !point;
  if (!point) return;
  const {item} = point;
  const changed = item.genotype.split("-").map((choice, slot) => [Number(choice), state.slots[slot]]).filter(([choice]) => choice);
  const lines = [...item.texts.map((text, index) => `${state.objectives[index].label}: ${text}`),
    ...(item.tuned_drop === undefined ? [] : [`PSNR drop (dB) fine-tuned: ${item.tuned_drop.toFixed(3)}`]),
    ...changed.slice(0, 12).map(([choice, slot]) => `${slot.name}: ${slot.choices[choice].label}`),
    ...(changed.length > 12 ? [`and ${changed.length - 12} more slots`] : changed.length ? [] : ["the teacher in every slot"])];
  tip.replaceChildren(html("b", {class: "genotype"}, item.genotype), ...lines.map(line => html("span", {}, line)));
  const room = at("front").clientWidth, high = at("front").clientHeight;
  tip.style.left = `${Math.max(0, Math.min(point.x + 14, room - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, point.y + 14 + tip.offsetHeight > high ? point.y - 14 - tip.offsetHeight : point.y + 14)}px`;
}

// ---- the chosen hybrid

function drawShape(item) {
  const picture = at("shape"), levels = state.levels, count = levels.length, room = picture.clientWidth;
  const step = room / count, width = Math.max(5, Math.min(90, step - 4)), height = 36, rise = 50, depth = Math.max(...levels);
  picture.setAttribute("viewBox", `0 0 ${room} ${depth * rise + height + 4}`);
  picture.replaceChildren();
  const x = index => index * step + step / 2, y = index => levels[index] * rise + height / 2 + 2;
  const deepest = levels.indexOf(depth);
  levels.forEach((level, index) => {
    const partner = levels.findIndex((other, place) => place > deepest && other === level);
    if (index < deepest && levels[index + 1] !== level && partner > 0) {
      picture.append(svg("line", {class: "skip", x1: x(index), y1: y(index), x2: x(partner), y2: y(partner)}));
    }
  });
  picture.append(svg("polyline", {class: "thread", points: levels.map((_, index) => `${x(index)},${y(index)}`).join(" ")}));
  item.genotype.split("-").forEach((choice, index) => {
    const slot = state.slots[index], {label, fill, ink} = slot.choices[choice], [family, rest] = label.split("×");
    const fit = Math.floor(1.65 * (width - 4) / 8), name = family.length > fit ? family.slice(0, fit - 1) + "…" : family;
    const size = Math.min(12, 1.65 * (width - 4) / name.length);
    const group = svg("g", {}, svg("title", {}, `${slot.name}: ${label}`),
      svg("rect", {x: x(index) - width / 2, y: y(index) - height / 2, width, height, rx: 4, fill}));
    if (fit >= 4) {
      group.append(svg("text", {x: x(index), y: y(index) - 2, "text-anchor": "middle", "font-size": size, fill: ink}, name),
        svg("text", {x: x(index), y: y(index) + 12, "text-anchor": "middle", "font-size": Math.min(11, size), fill: ink}, "×" + rest.split("(")[0]));
    }
    picture.append(group);
  });
}

function drawValues(item) {
  const costs = item.texts.flatMap((text, index) => {
    const {label} = state.objectives[index], own = state.teacher[index];
    const share = own ? ` · ${(100 * item.values[index] / own).toFixed(0)} %` : "";
    return index === quality ? [] : [[label, text + share]];
  });
  const before = [...(item.psnr ? [["PSNR (dB)", item.psnr]] : []), ...(quality >= 0 ? [["PSNR drop (dB)", item.texts[quality]]] : [])];
  const after = item.tuned ? [["PSNR (dB)", item.tuned], ...(item.tuned_drop === undefined ? [] : [["PSNR drop (dB)", item.tuned_drop.toFixed(3)]])]
    : [["not fine-tuned yet"]];
  at("values").replaceChildren(...[["Cost, and share of the teacher's", costs], ["As searched, before fine-tuning", before], ["Fine-tuned", after]].map(([title, rows]) =>
    html("tbody", {}, html("tr", {}, html("th", {colspan: 2, scope: "rowgroup"}, title)),
      ...rows.map(cells => html("tr", {}, ...cells.map(text => html("td", cells.length > 1 ? {} : {colspan: 2}, text)))))));
}

function choose(number) {
  chosen = number;
  const item = state.items[number], place = view.members.indexOf(number), role = place < 0 ? "not on this front" : view.roles[place];
  [...at("map").tBodies[0].rows].forEach((row, index) => {
    row.classList.toggle("chosen", index === place);
    row.tabIndex = index === (place < 0 ? view.knee : place) ? 0 : -1;
    row.setAttribute("aria-current", index === place);
  });
  at("chosen").textContent = item.genotype;
  at("role").textContent = role;
  at("command").textContent = `${state.command} --pick ${item.genotype}`;
  at("copy").textContent = "Copy";
  at("advice").textContent = (item.worse ? "It restores worse than leaving the image as it is. " : "") + (item.tuned || !/[1-9]/.test(item.genotype) ? ""
    : `Not fine-tuned yet: the same command with ens finetune in place of ens export, run first, makes the exported file better.`);
  at("slots").replaceChildren(...item.genotype.split("-").flatMap((choice, index) => {
    const {name, choices} = state.slots[index];
    return [html("dt", {}, name), html("dd", {}, choices[choice].label)];
  }));
  drawValues(item);
  drawShape(item);
  moveRing();
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText(at("command").textContent);
    at("copy").textContent = "Copied";
  } catch {  // a page that is served without https may only select
    getSelection().selectAllChildren(at("command"));
    at("copy").textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  }
}

// ---- the slot map

function drawMap() {
  const order = state.objectives.map((_, index) => index), shown = [view.y, view.x, ...order].filter((one, index, all) => all.indexOf(one) === index);
  const costs = shown.filter(index => index !== quality), hasTuned = view.members.some(number => state.items[number].tuned);
  const hasPsnr = view.members.some(number => state.items[number].psnr);
  const before = [...(quality >= 0 ? ["PSNR drop (dB)"] : []), ...(hasPsnr ? ["PSNR (dB)"] : [])];
  const after = hasTuned ? ["PSNR drop (dB)", "PSNR (dB)"] : [];
  const cell = (name, text) => html("td", {class: name}, text);
  const head = (texts, name) => texts.map(text => html("th", {class: name, scope: "col"}, text));
  const group = (texts, title) => texts.length ? [html("th", {class: "group", scope: "colgroup", colspan: texts.length}, title)] : [];
  at("map").tHead.replaceChildren(
    html("tr", {}, html("td"), html("td"), ...group(costs, "cost"), ...group(before, "before fine-tuning"), ...group(after, "fine-tuned"), ...group(state.slots, "slots")),
    html("tr", {}, ...head(["genotype", ""]), ...head([...costs.map(index => state.objectives[index].label), ...before, ...after], "number"),
      ...head(state.slots.map(slot => slot.name), "slot")));
  at("map").tBodies[0].replaceChildren(...view.members.map((number, index) => {
    const item = state.items[number], drop = item.texts[quality] + (view.same[index] ? " ≈" : "");
    const role = html("td", {}, html("span", {class: "role"}, view.roles[index]));
    const texts = [...costs.map(cost => item.texts[cost]), ...(quality >= 0 ? [drop] : []), ...(hasPsnr ? [item.psnr ?? ""] : []),
      ...(hasTuned ? [item.tuned_drop?.toFixed(3) ?? "", item.tuned ?? ""] : [])];
    const row = html("tr", {}, html("td", {class: "genotype", title: item.genotype}, item.genotype + (item.worse ? " ▼" : "")), role,
      ...texts.map(text => cell("number", text)), ...item.genotype.split("-").map((choice, slot) => {
        const {label, short, fill, ink} = state.slots[slot].choices[choice];
        const node = html("td", {class: "cell", title: `${state.slots[slot].name}: ${label}`}, state.slots.length > 12 ? "" : short);
        node.style.background = fill;
        node.style.color = ink;
        return node;
      }));
    row.addEventListener("click", () => choose(number));
    return row;
  }));
}

// ---- input

const moves = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity};

// Choose the member that a key leads to from another one, in the given order of members; undefined for other keys.
function move(event, from, order) {
  if (!(event.key in moves)) return undefined;
  event.preventDefault();
  const number = order[Math.max(0, Math.min(order.length - 1, order.indexOf(from) + moves[event.key]))];
  choose(number);
  return number;
}

at("front").addEventListener("keydown", event => {
  const axis = /Up|Down/.test(event.key) ? view.y : view.x, falling = axis === view.y ? -1 : 1;
  move(event, chosen, [...view.members].sort((one, other) =>
    falling * (state.items[one].values[axis] - state.items[other].values[axis])));
});
at("map").tBodies[0].addEventListener("keydown", event => {
  const rows = [...event.currentTarget.rows], here = view.members[rows.indexOf(event.target)];
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(here);
  }
  const number = move(event, here, view.members);
  if (number !== undefined) rows[view.members.indexOf(number)].focus();
});
at("front").addEventListener("pointermove", event => showTip(nearest(event, 16)));
at("front").addEventListener("pointerleave", () => showTip(null));
at("front").addEventListener("click", event => {
  const point = nearest(event, 24);
  if (point) choose(state.items.indexOf(point.item));
});
at("copy").addEventListener("click", copyCommand);
state.views.forEach((one, number) => at("axes").add(new Option(one.label, number)));
at("axes").addEventListener("change", () => {
  view = state.views[at("axes").value];
  show();
});
at("range").addEventListener("change", drawFront);

function drawGrowth() {
  if (!at("growth") || !state.growth.length) return;
  const last = state.growth.at(-1)[0], plot = drawAxes(at("growth"), {label: "valid measurements", low: 0, high: last * 1.02},
    {label: "hypervolume (%)", low: 0, high: 105});
  at("growth").append(svg("path", {class: "line", d: `M${plot.x(0)},${plot.y(0)}` +
    state.growth.map(([number, share]) => `H${plot.x(number)}V${plot.y(share)}`).join("")}));
}

function show() {
  drawMap();
  drawFront();
  choose(view.members[view.knee]);
}

show();
new ResizeObserver(() => {
  drawFront();
  drawShape(state.items[chosen]);
  drawGrowth();
}).observe(at("front"));
