// The page: asks the server how things stand, and shows it. See molora/serve/http/page.py.

import { ask, at, count, hideError, key, percent, Refused, showError, write } from "./common.js";
import { clearAnswer, offer, startAsking, stopAnswer } from "./routing.js";
import { adaptersQuery, clearTables, PAGE, showAdapters, showShares, wanted } from "./tables.js";

const OFTEN = 2000; // milliseconds between two looks
const SELDOM = 60000; // at most, while nobody looks

let timer = 0;
let delay = OFTEN;
let turn = 0; // which look is the latest; answers to earlier ones are dropped
let overview = null;
let names = []; // what may be asked, as of the last time that the number of adapters changed
let namesOf = null;

// --- looking --------------------------------------------------------------------------------------------------------

async function look() {
  clearTimeout(timer);
  const mine = ++turn;
  try {
    const found = await (await ask(`/v1/overview?${adaptersQuery()}`)).json();
    if (mine !== turn) return;
    if (found.adapters.found > 0 && wanted.offset >= found.adapters.found) {
      wanted.offset = PAGE * Math.floor((found.adapters.found - 1) / PAGE); // adapters went, and this page with them
      look();
      return;
    }
    await learnNames(found);
    if (mine !== turn) return;
    overview = found;
    hideError(at("page-error"));
    show();
  } catch (error) {
    if (mine === turn) stop(error); // looks no more until told to
    return;
  }
  delay = document.hidden ? Math.min(2 * delay, SELDOM) : OFTEN;
  timer = setTimeout(look, delay);
}

async function learnNames(found) {
  const of = `${found.caller.kind} ${found.caller.name} ${found.adapters.total}`;
  if (of === namesOf) return;
  names = found.caller.kind === "admin" ? [] : (await (await ask("/v1/models")).json()).data.map((one) => one.id);
  namesOf = of;
}

function show() {
  const { caller, engine } = overview;
  const isFirst = at("model").textContent === "";
  write(at("model"), overview.model);
  const kinds = {
    admin: "Admin: sees everything. To ask for answers, enter a tenant's key.",
    everybody: "No tenants: everybody sees everything.",
    tenant: `Tenant ${caller.name}.`,
  };
  write(at("who"), kinds[caller.kind]);
  const used = engine?.kv_capacity ? `, KV memory ${percent(engine.kv_used / engine.kv_capacity)}` : "";
  const state = engine?.draining ? "going down" : engine?.healthy === false ? "the engine has stopped" : "";
  const load = engine === null ? "" : `${count(engine.running)} running, ${count(engine.waiting)} waiting, ` +
    `${count(engine.tokens_out)} tokens drawn${used}`;
  write(at("engine"), state || load);
  if (isFirst) {
    at("chat").checked = overview.chat;
    if (!at("ask-model").value && caller.base) at("ask-model").value = overview.model;
  }
  showAdapters(overview.adapters, caller.manage, pin);
  showShares(overview.shares);
  at("load").hidden = !caller.manage;
  offer(overview, names);
}

function stop(error) {
  clearTimeout(timer);
  if (error.status === 401) {
    forget();
    if (!key.get()) {
      const missing = new Refused("This server has tenants. Enter a key to see what it may see.", -1);
      showError(at("page-error"), Object.assign(missing, { title: "A key is needed" }));
      return;
    }
  }
  const known = error instanceof Refused ? error : new Refused(`The answer cannot be shown: ${error.message}`, -1);
  showError(at("page-error"), known, look);
}

// --- the key --------------------------------------------------------------------------------------------------------

// Forgets what is on the page: it was shown to the key that was entered before.
function forget() {
  overview = null;
  names = [];
  namesOf = null;
  stopAnswer();
  clearTables();
  at("filter").value = wanted.contains = "";
  at("ask-model").value = "";
  at("load").hidden = true;
  at("models").replaceChildren();
  for (const id of ["adapters-error", "page-error"]) hideError(at(id));
  for (const id of ["model", "engine", "who", "loaded"]) write(at(id), "");
  at("send").disabled = true; // until it is known who asks
}

function useKey(value) {
  if (!/^[\x21-\x7e]*$/.test(value)) {
    showError(at("page-error"), new Refused("A key is letters, digits and signs, without spaces.", -1));
    return;
  }
  key.set(value);
  at("key").value = "";
  showKey();
  forget();
  look();
}

function showKey() {
  at("forget").hidden = !key.get();
  at("key").placeholder = key.get() ? "in use in this tab" : "none entered";
}

// --- adapters -------------------------------------------------------------------------------------------------------

async function change(action, control) {
  control.disabled = true;
  hideError(at("adapters-error"));
  try {
    await action();
    await look();
  } catch (error) {
    showError(at("adapters-error"), error instanceof Refused ? error : new Refused(error.message, -1));
  } finally {
    control.disabled = false;
    control.focus(); // a control that is disabled loses the focus
  }
}

function pin(name, pinned, button) {
  const path = `/v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;
  change(() => ask(path, { method: "PATCH", body: { pinned } }), button);
}

function load(event) {
  event.preventDefault();
  const name = at("load-name").value.trim();
  change(async () => {
    write(at("loaded"), "");
    const told = await (await ask("/v1/adapters", { body: { name, pin: at("load-pin").checked } })).json();
    write(at("loaded"), `'${told.name}' is registered (${told.state}).`);
    at("load-name").value = "";
  }, at("load-name"));
}

function turnPage(by) {
  wanted.offset = Math.max(0, wanted.offset + by * PAGE);
  look();
}

// --- start ----------------------------------------------------------------------------------------------------------

let typing = 0;
at("filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    Object.assign(wanted, { contains: at("filter").value, offset: 0 });
    look();
  }, 150);
});
at("adapters").addEventListener("wanted", look);
at("before").addEventListener("click", () => turnPage(-1));
at("after").addEventListener("click", () => turnPage(1));
at("load").addEventListener("submit", load);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
});
at("forget").addEventListener("click", () => {
  useKey("");
  at("key").focus();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && at("page-error").hidden) look(); // at once, when somebody looks again
});
startAsking();
clearAnswer();
showKey();
look();
