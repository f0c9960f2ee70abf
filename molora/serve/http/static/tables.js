// The tables: adapters and where they are, and what each tenant got. Rows are kept and changed in place, so that focus
// and selection survive an update.

import { at, bytes, count, duration, make, meter, percent, write } from "./common.js";

export const PAGE = 25;
const ABOUT = {
  ready: "requests can use it now", warm: "in CPU memory", loading: "being loaded", queued: "about to be loaded",
  disk: "not loaded", errored: "its last load failed",
};

// --- adapters -------------------------------------------------------------------------------------------------------

const rows = new Map(); // name -> row of the table
export const wanted = { contains: "", state: null, offset: 0 };

export function adaptersQuery() {
  const told = new URLSearchParams({ contains: wanted.contains, offset: wanted.offset, limit: PAGE });
  if (wanted.state !== null) told.set("state", wanted.state);
  return told.toString();
}

export function showAdapters(told, manage, pin) {
  write(at("adapters-total"), count(told.total));
  showStates(told);
  const names = new Set(told.data.map((one) => one.name));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
  const body = at("adapters").tBodies[0];
  told.data.forEach((one, place) => {
    const row = rows.get(one.name) ?? newRow(one.name, pin);
    fillRow(row, one, manage);
    // moving a row takes the focus from it, so only what stands elsewhere is moved
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  const none = at("adapters-none");
  none.hidden = told.found > 0;
  write(none, told.total ? "No adapter fits this filter." : "No adapters are registered that you may use.");
  at("pager").hidden = told.found <= PAGE && wanted.offset === 0;
  const last = Math.min(wanted.offset + told.data.length, told.found);
  write(at("place"), told.data.length ? `${count(wanted.offset + 1)} to ${count(last)} of ${count(told.found)}` : "");
  at("before").disabled = wanted.offset === 0;
  at("after").disabled = wanted.offset + PAGE >= told.found;
}

function newRow(name, pin) {
  const row = document.createElement("tr");
  const error = make("span", { class: "why small" });
  const text = make("span", { class: "name" }, name);
  const head = make("th", { scope: "row" }, text, make("span", { class: "kind" }), error);
  row.append(head, make("td", {}, make("span", { class: "state" })));
  for (let number = 0; number < 5; number++) row.append(make("td", { class: "number" }));
  const button = make("button", { type: "button", class: "small" });
  button.addEventListener("click", () => pin(name, row.dataset.pinned !== "true", button));
  row.append(make("td", {}, make("span"), button));
  rows.set(name, row);
  return row;
}

function fillRow(row, one, manage) {
  const [head, state, used, waiting, rank, size, load, pinned] = row.cells;
  write(head.querySelector(".kind"), one.kind === "mixture" ? "mixture" : "");
  write(head.querySelector(".why"), one.error ?? "");
  const badge = state.firstChild;
  write(badge, one.state);
  badge.className = `state is-${one.state in ABOUT ? one.state : "disk"}`;
  badge.title = ABOUT[one.state] ?? "";
  write(used, one.in_use ? count(one.in_use) : "–");
  write(waiting, one.waiting ? count(one.waiting) : "–");
  write(rank, one.kind === "mixture" ? `${one.rank} experts` : String(one.rank));
  write(size, bytes(one.bytes));
  write(load, duration(one.last_load_ms));
  row.dataset.pinned = String(one.pinned);
  const [said, button] = pinned.children;
  write(said, one.pinned ? (manage ? "pinned " : "pinned") : manage ? "" : "–");
  button.hidden = !manage;
  write(button, one.pinned ? "Unpin" : "Pin");
  button.setAttribute("aria-label", `${one.pinned ? "Unpin" : "Pin"} ${one.name}`);
}

const chips = new Map();

function showStates(told) {
  for (const [state, number] of Object.entries(told.states)) {
    let chip = chips.get(state);
    if (chip === undefined) {
      chip = make("button", { type: "button", class: "chip", title: ABOUT[state] ?? "" },
        make("span", { class: `state is-${state}` }, state), make("span"));
      chip.addEventListener("click", () => {
        wanted.state = wanted.state === state ? null : state;
        wanted.offset = 0;
        at("adapters").dispatchEvent(new Event("wanted"));
      });
      chips.set(state, chip);
      at("states").append(chip);
    }
    write(chip.lastChild, ` ${count(number)}`);
    chip.setAttribute("aria-pressed", String(wanted.state === state));
    chip.disabled = number === 0 && wanted.state !== state;
  }
}

// --- shares ---------------------------------------------------------------------------------------------------------

export function showShares(shares) {
  at("shares-none").hidden = shares.length > 0;
  const body = at("shares").tBodies[0];
  while (body.rows.length > shares.length) body.deleteRow(-1);
  shares.forEach((one, place) => {
    const row = body.rows[place] ?? newShare(body);
    const [tenant, share, ...numbers] = row.cells;
    write(tenant, one.tenant);
    const texts = [String(one.weight), one.waiting ? count(one.waiting) : "–", count(one.input), count(one.output)];
    texts.forEach((text, index) => write(numbers[index], text));
    const due = one.due === null ? "" : `, due ${percent(one.due)}`;
    const text = `${percent(one.share)}${due}`;
    if (share.textContent !== text) share.replaceChildren(meter(one.share, null, one.due), make("span", {}, text));
  });
}

function newShare(body) {
  const row = body.insertRow();
  row.append(make("th", { scope: "row", class: "name" }), make("td", { class: "share" }));
  for (let number = 0; number < 4; number++) row.append(make("td", { class: "number" }));
  return row;
}

// Forgets what a key has shown.
export function clearTables() {
  rows.clear();
  chips.clear();
  Object.assign(wanted, { state: null, offset: 0 });
  for (const id of ["adapters", "shares"]) at(id).tBodies[0].replaceChildren();
  for (const id of ["states", "adapters-total", "place"]) at(id).replaceChildren();
  for (const id of ["pager", "adapters-none", "shares-none"]) at(id).hidden = true;
}
