// Asking: a prompt goes to the server, and its answer comes back as a stream of events.

import { ask, at, hideError, make, Refused, showError, write } from "./common.js";
import { clearTokens, drawn, listen, take } from "./tokens.js";

let running = null; // what stops the answer that is coming

// --- asking ---------------------------------------------------------------------------------------------------------

export function startAsking() {
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    answer();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
  });
  at("ask-model").addEventListener("input", showSelector);
  listen();
}

// Tells what may be asked: the names, the selectors of `auto`, whether the model has a template for chats.
export function offer(overview, names) {
  const isAdmin = overview.caller.kind === "admin";
  at("send").disabled = isAdmin || running !== null;
  const all = overview.selectors.length && !isAdmin ? ["auto", ...names.filter((name) => name !== "auto")] : names;
  const list = at("models");
  if (list.children.length !== all.length || all.some((name, place) => list.children[place].value !== name)) {
    list.replaceChildren(...all.map((name) => make("option", { value: name })));
  }
  const selector = at("selector");
  if (selector.children.length !== overview.selectors.length) {
    selector.replaceChildren(...overview.selectors.map((name) => make("option", { value: name }, name)));
  }
  showSelector();
}

function showSelector() {
  at("selector-field").hidden = at("ask-model").value.trim() !== "auto" || at("selector").children.length < 2;
}

// Returns the weights of "news:0.7, law:0.3"; null for a plain name.
function weights(text) {
  if (!text.includes(":")) return null;
  const pairs = text.split(",").map((part) => part.trim()).filter(Boolean).map((part) => {
    const cut = part.lastIndexOf(":");
    const weight = cut < 0 ? "" : part.slice(cut + 1).trim();
    return [part.slice(0, cut).trim(), weight ? Number(weight) : Number.NaN];
  });
  const wrong = pairs.find(([name, weight]) => !name || !Number.isFinite(weight));
  if (wrong) throw new Refused("Weights are written as name:number, with commas between: news:0.7, law:0.3.", -1);
  return Object.fromEntries(pairs);
}

function request(base) {
  const model = at("ask-model").value.trim();
  const adapters = weights(model);
  const molora = { trace: true };
  if (adapters !== null) molora.adapters = adapters;
  if (!at("selector-field").hidden) molora.selector = at("selector").value;
  const text = at("prompt").value;
  const prompt = at("chat").checked ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  return {
    model: adapters === null ? model : base, ...prompt, molora, stream: true,
    max_tokens: at("tokens").valueAsNumber, temperature: at("temperature").valueAsNumber,
  };
}

async function answer() {
  if (running !== null || at("send").disabled) return;
  const stopping = new AbortController();
  running = stopping;
  clearAnswer();
  at("send").disabled = true;
  at("stop").disabled = false;
  write(at("progress"), "Waiting …");
  let finish = "cut off";
  try {
    const body = request(at("model").textContent);
    const path = at("chat").checked ? "/v1/chat/completions" : "/v1/completions";
    const response = await ask(path, { body, signal: stopping.signal });
    at("answer").hidden = false;
    write(at("progress"), "Answering …");
    for await (const event of events(response)) {
      if (running !== stopping) return; // the key was changed meanwhile
      if (event.error) throw new Refused(String(event.error.message), -1, event.error.code ?? null);
      finish = take(event) ?? finish;
    }
    write(at("progress"), `${drawn()}, ended by ${finish}.`);
  } catch (error) {
    if (running !== stopping) return;
    if (error.name === "AbortError") write(at("progress"), `Stopped after ${drawn()}.`);
    else {
      write(at("progress"), "");
      const known = error instanceof Refused ? error : new Refused("The answer was cut off on its way.", 0);
      showError(at("ask-error"), known, answer);
    }
  } finally {
    if (running === stopping) {
      running = null;
      at("send").disabled = false;
      at("stop").disabled = true;
    }
  }
}

// Yields the events of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The answer was cut off on its way.", 0);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

// Forgets an answer.
export function clearAnswer() {
  clearTokens();
  hideError(at("ask-error"));
  at("answer").hidden = true;
  write(at("progress"), "");
}

// Forgets an answer, and stops it if it is still coming.
export function stopAnswer() {
  running?.abort();
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  clearAnswer();
}
