// What the parts of the page share: elements without markup from texts, requests, errors, numbers.

export const at = (id) => document.getElementById(id);

// Returns an element; texts become text nodes, never markup: names and answers are whatever others wrote.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Sets a text only where it differs, so that nothing is announced or repainted for nothing.
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// --- requests -------------------------------------------------------------------------------------------------------

const KEPT = "molora.key"; // in sessionStorage: gone with the tab

export const key = {
  get: () => sessionStorage.getItem(KEPT) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEPT, value) : sessionStorage.removeItem(KEPT)),
};

export class Refused extends Error {
  constructor(message, status, code = null, after = null) {
    super(message);
    Object.assign(this, { status, code, after });
  }
}

// Asks the server; throws Refused with what it said, or that it said nothing.
export async function ask(path, { body, method, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. It may be starting or stopped.", 0);
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // not an answer of this server; its status says what there is to say
  }
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  throw new Refused(String(told.message ?? response.statusText), response.status, told.code ?? null,
    Number.isFinite(after) ? Math.min(after, 86400) : null);
}

// --- errors ---------------------------------------------------------------------------------------------------------

const TITLES = {
  0: "No answer", 401: "Key refused", 403: "Not allowed", 404: "Not found", 409: "Not now", 413: "Too long",
  429: "Too many requests", 503: "Server busy",
};
const countdowns = new WeakMap();

export function hideError(box) {
  clearInterval(countdowns.get(box));
  box.hidden = true;
  box.replaceChildren();
}

// Shows what went wrong in a box; `retry` is offered, after the time that the server asked to wait.
export function showError(box, error, retry = null) {
  hideError(box);
  const status = error.status ?? -1;
  const other = status >= 500 ? "Server error" : status > 0 ? "Request refused" : "Error";
  const title = error.title ?? TITLES[status] ?? other;
  const facts = [status > 0 ? `${status}` : "", error.code ?? ""].filter(Boolean).join(", ");
  box.append(make("strong", {}, title), facts ? make("span", { class: "quiet small" }, ` (${facts})`) : "",
    make("p", {}, error.message));
  if (retry !== null) {
    const button = make("button", { type: "button" }, "Try again");
    button.addEventListener("click", () => {
      hideError(box);
      retry();
    });
    box.append(button);
    if (error.after) countDown(box, button, error.after);
  }
  box.classList.toggle("calm", error.title !== undefined); // nothing went wrong, something is missing
  box.hidden = false;
}

function countDown(box, button, seconds) {
  const end = performance.now() + 1000 * seconds;
  button.disabled = true;
  const tell = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) return;
    button.disabled = false;
    clearInterval(countdowns.get(box));
  };
  countdowns.set(box, setInterval(tell, 500));
  tell();
}

// --- numbers --------------------------------------------------------------------------------------------------------

export const count = (number) => Math.round(number).toLocaleString("en");
export const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  for (; number >= 1024 && power < units.length - 1; power++) number /= 1024;
  return `${number.toFixed(power && number < 100 ? 1 : 0)} ${units[power]}`;
}

export function duration(ms) {
  if (ms === null) return "–";
  return ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

// A bar from 0 to 1, with a mark at `due`; the number stands beside it, so readers need not hear it.
export function meter(part, hue = null, due = null) {
  const fill = make("span", { class: hue === null ? "fill" : `fill hue${hue}` });
  fill.style.setProperty("--part", String(Math.max(0, Math.min(1, part))));
  const bar = make("span", { class: "meter", "aria-hidden": "true" }, fill);
  if (due !== null) {
    const mark = make("span", { class: "mark" });
    mark.style.setProperty("--part", String(due));
    bar.append(mark);
  }
  return bar;
}
