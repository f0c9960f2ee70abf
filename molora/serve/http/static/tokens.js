// Tokens: each in the colour of the expert that had most of it, with its entropy, and what `auto` chose.

import { at, make, meter, percent, write } from "./common.js";

const HUES = 8;
let shown = []; // tokens: {element, bar, text, experts, entropy, isPrompt}
let told = null; // what the server said of an answer beside its text
let hues = new Map(); // expert -> number, which is its colour and the label under its tokens
let chosen = null; // the token that is told about
let highest = 0; // entropy so far
let drawing = 0; // of the legend, which waits for the next frame

// --- what comes -----------------------------------------------------------------------------------------------------

// Takes an event; returns how the answer ended, once it has.
export function take(event) {
  const choice = event.choices?.[0];
  const { trace = [], prompt_trace: prompt = [], ...facts } = event.molora ?? {};
  if (Object.keys(facts).length) {
    told = { ...told, ...facts };
    showChosen();
  }
  const text = choice?.delta?.content ?? choice?.text ?? "";
  for (const one of prompt) add(one.token, one, true);
  if (prompt.length) at("answer-tokens").append(make("br"));
  // the text of a chunk is right where that of a single token is not: spaces, and characters of several tokens
  if (trace.length <= 1) add(text || (trace[0]?.token ?? ""), trace[0]);
  else trace.forEach((one) => add(one.token, one));
  return choice?.finish_reason ?? null;
}

function add(text, routing, isPrompt = false) {
  if (!text && !routing) return;
  const experts = (routing?.experts ?? []).map(([name, gate]) => [String(name), Number(gate)]);
  const entropy = routing?.entropy ?? null;
  const one = { text, experts, entropy, isPrompt, bar: null };
  const kind = isPrompt ? "token of-prompt" : "token";
  const tabindex = shown.length ? "-1" : "0"; // one stop for all; arrow keys go on
  one.element = make("span", { role: "option", class: kind, "aria-selected": "false", tabindex });
  // a token's box is inline, so a line that ends in it is ended behind the box
  const lines = text.split("\n");
  one.element.append(lines.join("↵"));
  at("answer-tokens").append(one.element, lines.length > 1 ? make("br") : "");
  shown.push(one);
  if (experts.length === 0) experts.push(...constant());
  else {
    one.bar = make("span", { class: isPrompt ? "bar of-prompt" : "bar" });
    at("strip").append(one.bar);
    at("strip-part").hidden = false;
  }
  paint(one);
  scale();
  showLegend();
}

// Returns the experts of all tokens, where no router decides.
function constant() {
  return Object.entries(told?.adapters ?? {}).sort((one, other) => Math.abs(other[1]) - Math.abs(one[1]));
}

function hue(expert) {
  if (!hues.has(expert)) hues.set(expert, /^\d{1,6}$/.test(expert) ? Number(expert) : hues.size);
  return hues.get(expert);
}

function paint(one) {
  if (one.experts.length === 0) return;
  const number = hue(one.experts[0][0]);
  one.element.classList.add(`hue${number % HUES}`);
  if (one.entropy === null) return;
  one.element.dataset.label = String(number);
  if (one.bar !== null) {
    one.bar.classList.add(`hue${number % HUES}`);
    one.bar.style.setProperty("--height", String(one.entropy));
  }
}

function scale() {
  const last = shown.at(-1)?.entropy ?? 0;
  if (last <= highest && highest > 0) return;
  highest = Math.max(highest, last);
  at("strip").style.setProperty("--highest", String(highest || 1));
  write(at("strip-scale"), `nats, to ${highest.toFixed(2)}`);
}

function showLegend() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    const most = new Map();
    for (const one of shown) {
      if (one.experts.length) most.set(one.experts[0][0], (most.get(one.experts[0][0]) ?? 0) + 1);
    }
    at("legend-part").hidden = most.size === 0;
    if (most.size === 0) return;
    const isRouted = shown.some((one) => one.entropy !== null);
    const fixed = isRouted ? [] : shown[0].experts;
    const items = isRouted
      ? [...most].sort((one, other) => other[1] - one[1]).map(([name, number]) => [name, number / shown.length])
      : fixed;
    write(at("legend-title"), isRouted ? "Main expert of how many tokens" : "Weights");
    at("legend").replaceChildren(...items.slice(0, 16).map(([name, part]) => bar(name, part, isRouted)));
  });
}

function bar(name, part, isPercent) {
  const number = hue(name);
  return make("li", {},
    make("span", { class: `key hue${number % HUES}`, "aria-hidden": "true" }, String(number)),
    make("span", { class: "name" }, /^\d+$/.test(name) ? `expert ${name}` : name),
    meter(Math.abs(part), number % HUES),
    make("span", { class: "number" }, isPercent ? percent(part) : part.toFixed(3)));
}

// --- what auto chose ------------------------------------------------------------------------------------------------

function showChosen() {
  for (const one of shown) {
    if (one.experts.length) continue;
    one.experts.push(...constant());
    paint(one);
  }
  showLegend();
  const box = at("chosen");
  box.hidden = told.why === undefined;
  if (box.hidden) return;
  const names = Object.entries(told.adapters ?? told.weights ?? {});
  const what = told.abstained || (!names.length && !told.mixture) ? "no adapter: the base model answers alone"
    : told.mixture ?? names.map(([name, weight]) => `${name} (${Number(weight).toFixed(2)})`).join(", ");
  const from = told.selector === undefined ? "auto" : `auto (${told.selector})`;
  const scores = Object.entries(told.scores ?? {}).sort((one, other) => other[1] - one[1]).slice(0, 6);
  box.replaceChildren(make("p", {}, make("strong", {}, `${from} chose ${what}`)), make("p", {}, String(told.why)));
  if (scores.length) {
    const list = scores.map(([name, score]) => make("span", { class: "score" }, `${name} ${Number(score).toFixed(3)}`));
    box.append(make("p", { class: "quiet small" }, "Scores: ", ...list));
  }
}

// --- one token ------------------------------------------------------------------------------------------------------

export function listen() {
  at("answer-tokens").addEventListener("keydown", walk);
  for (const event of ["click", "focusin"]) {
    at("answer-tokens").addEventListener(event, ({ target }) => {
      const place = shown.findIndex((one) => one.element.contains(target));
      if (place >= 0) choose(place, event === "click");
    });
  }
}

function walk(event) {
  const now = shown.findIndex((one) => one.element === document.activeElement);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -now, End: shown.length - 1 - now };
  if (now < 0 || steps[event.key] === undefined) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(shown.length - 1, now + steps[event.key])), true);
}

function choose(place, takesFocus) {
  const one = shown[place];
  if (chosen !== one) {
    if (chosen !== null) {
      chosen.element.setAttribute("aria-selected", "false");
      chosen.element.tabIndex = -1;
    }
    shown[0].element.tabIndex = -1;
    chosen = one;
    one.element.setAttribute("aria-selected", "true");
    one.element.tabIndex = 0;
    tell(one, place);
  }
  if (takesFocus && document.activeElement !== one.element) one.element.focus();
}

function tell(one, place) {
  const box = at("token");
  const entropy = one.entropy === null ? "" : `, entropy ${one.entropy.toFixed(2)}`;
  const number = shown.slice(0, place + 1).filter((other) => other.isPrompt === one.isPrompt).length;
  const where = `${one.isPrompt ? "Prompt" : "Answer"}, ${number}: `;
  box.replaceChildren(make("h3", {}, where, make("q", {}, one.text.replaceAll("\n", "↵")), entropy));
  if (one.experts.length) {
    const experts = one.experts.map(([name, gate]) => bar(name, gate, false));
    const label = one.entropy === null ? "Weights" : "Mean gates";
    box.append(make("ul", { class: "meters", "aria-label": label }, ...experts));
  } else box.append(make("p", { class: "quiet" }, "No expert acted on it."));
  box.hidden = false;
}

// Says how much of an answer there is; a piece is a token, or several that make a character.
export function drawn() {
  const number = shown.filter((one) => !one.isPrompt).length;
  return number === 1 ? "1 piece" : `${number} pieces`;
}

// Forgets the tokens of an answer.
export function clearTokens() {
  shown = [];
  hues = new Map();
  told = chosen = null;
  highest = 0;
  cancelAnimationFrame(drawing);
  for (const id of ["answer-tokens", "strip", "legend", "token", "chosen"]) at(id).replaceChildren();
  for (const id of ["strip-part", "legend-part", "token", "chosen"]) at(id).hidden = true;
}
