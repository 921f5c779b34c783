// The page: conversations in a side bar, one of them with one or two branches in front, settings, and the message field.

import * as api from "./api.js";
import { Dialogue } from "./tree.js";
import { make, Pane } from "./view.js";

const $ = (id) => document.getElementById(id);
const FIELDS = [
  ["temperature", "Temperature", "0 is the likeliest token"],
  ["top_p", "Top p", ""],
  ["top_k", "Top k", "0 is all"],
  ["min_p", "Min p", ""],
  ["repetition_penalty", "Repetition penalty", ""],
  ["presence_penalty", "Presence penalty", ""],
  ["frequency_penalty", "Frequency penalty", ""],
  ["max_new_tokens", "Longest answer, tokens", ""],
  ["seed", "Seed", ""],
];
const state = { models: [], list: [], dialogue: null, pending: { system: "", settings: {} }, following: null, busy: false };

// ---- what is told to the user

function note(text, bad = false) {
  $("note").textContent = text;
  $("note").classList.toggle("bad", bad);
}

async function trying(work) {
  try {
    note("");
    return await work();
  } catch (error) {
    if (error.status === 401) await askKey();
    else note(error.message, true);
    return undefined;
  }
}

function ask(title, { text = "", hint = "", line = false, ok = "OK", secret = false, confirm = false } = {}) {
  const dialog = $("ask"), field = line ? $("ask-line") : $("ask-text");
  $("ask-title").textContent = title;
  $("ask-hint").textContent = hint;
  $("ask-hint").hidden = !hint;
  $("ask-text").hidden = line || confirm;
  $("ask-line").hidden = !line || confirm;
  $("ask-line").type = secret ? "password" : "text";
  $("ask-ok").textContent = ok;
  field.value = text;
  dialog.returnValue = "";
  dialog.showModal();
  if (confirm) $("ask-cancel").focus();
  else field.focus();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "ok" ? (confirm ? true : field.value) : null);
  });
}

async function askKey() {
  const key = await ask("An API key is needed", { line: true, secret: true, hint: "It is kept until this tab is closed." });
  if (key) {
    api.useKey(key);
    await begin();
  }
}

// ---- side bar

async function refresh() {
  const found = await api.get("/api/conversations");
  state.list = found.conversations;
  if (found.remarks.length) note(found.remarks[found.remarks.length - 1], true);
  showList();
}

function showList() {
  const wanted = $("filter").value.toLowerCase();
  const items = state.list
    .filter((one) => one.name.toLowerCase().includes(wanted))
    .slice(0, 500)
    .map((one) => {
      const when = new Date(one.changed * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      const entry = make("button", { type: "button", onclick: () => open(one.id), title: one.name, text: one.name }, make("small", { text: when }));
      if (one.id === state.dialogue?.id) entry.setAttribute("aria-current", "page");
      return make("li", {}, entry);
    });
  if (!items.length) items.push(make("li", { class: "hint", text: wanted ? "None found" : "No conversations yet" }));
  $("list").replaceChildren(...items);
}

function side(opened) {
  document.body.classList.toggle("side-open", opened);
  if (opened) $("filter").focus();
}

// ---- the conversation

function modelOf(name) {
  return state.models.find((model) => model.name === name || model.id === name);
}

function settings() {
  return state.dialogue ? state.dialogue.settings : state.pending.settings;
}

function chosen(which) {
  const name = which ? settings().compare : settings().model;
  return modelOf(name)?.id || state.models[0]?.id || "";
}

const sides = () => (settings().compare ? [0, 1] : [0]);

function open(id) {
  state.following?.abort();
  state.dialogue = null;
  panes.forEach((pane) => pane.clear());
  history.replaceState(null, "", id ? `#${id}` : location.pathname);
  side(false);
  note("");
  if (!id) {
    state.pending = { system: "", settings: {} };
    show();
    showList();
    $("text").focus();
    return;
  }
  const following = (state.following = new AbortController());
  const dialogue = new Dialogue(id);
  api.follow(id, (event) => take(event, id), (error, last) => {
    if (error.status === 401) askKey();
    else note(error.message, true);
    if (last && error.status === 404 && state.dialogue?.id === id) open("");
  }, following.signal);
  state.dialogue = dialogue;
  show();
  showList();
}

function take(event, id) {
  if (state.dialogue?.id !== id) return;
  if (event.reset) {
    state.dialogue = new Dialogue(id);
    note("");
  }
  if (event.deleted) {
    open("");
    note("The conversation was deleted.");
    refresh();
    return;
  }
  for (const number of event.live || []) state.dialogue.live.set(number, { start: performance.now(), tokens: 0 });
  for (const record of event.records || []) state.dialogue.apply(record);
  if (event.ended) {
    state.dialogue.live.delete(event.ended);
    const node = state.dialogue.nodes.get(event.ended);
    if (!state.dialogue.live.size) note(event.error || "", !!event.error);
    $("said").textContent = node ? `${node.model} has answered: ${node.content.slice(0, 2000)}` : "";
    trying(refresh);
  } else if (event.error) note(event.error, true);
  if (event.records?.some((record) => record.type === "name")) trying(refresh);
  show();
}

let drawn = 0;
function show() {
  if (!drawn) drawn = document.hidden ? setTimeout(draw, 100) : requestAnimationFrame(draw); // none come while hidden
}

function empty() {
  const system = state.pending.system ? "A system prompt is set." : "Settings hold a system prompt and the sampling.";
  return make("div", { class: "empty" }, make("h2", { text: "What shall we talk about?" }), make("p", { text: `Conversations are kept on the server. ${system}` }));
}

function draw() {
  drawn = 0;
  const dialogue = state.dialogue, both = sides().length > 1, live = !!dialogue?.live.size;
  $("name").textContent = dialogue ? dialogue.name : "New conversation";
  document.title = dialogue?.name ? `${dialogue.name} · lit_llama` : "lit_llama";
  panes[1].node.hidden = !both;
  for (const which of sides()) panes[which].show(dialogue, both ? `${which + 1} · ${chosen(which)}` : "", empty);
  $("model").value = chosen(0);
  $("other").hidden = !both;
  if (both) $("other").value = chosen(1);
  $("compare").setAttribute("aria-pressed", both);
  $("stop").hidden = !live;
  $("send").hidden = live;
  $("more").hidden = !dialogue;
  use();
  for (const entry of $("list").querySelectorAll("[aria-current]")) if (!dialogue) entry.removeAttribute("aria-current");
}

function use() {
  const told = sides().map((which) => {
    const path = state.dialogue ? state.dialogue.path(which) : [];
    const last = path.findLast((node) => node.role === "assistant" && node.prompt_tokens);
    const used = last ? last.prompt_tokens + last.tokens : 0;
    const reads = modelOf(chosen(which))?.context || 1;
    return { used, reads, text: `context ${used.toLocaleString()} of ${reads.toLocaleString()} tokens (${Math.round((100 * used) / reads)} %)` };
  });
  const most = told.reduce((a, b) => (b.used > a.used ? b : a));
  $("use-text").textContent = most.text;
  $("use-bar").value = most.used / most.reads;
}

const url = (more = "") => `/api/conversations/${encodeURIComponent(state.dialogue.id)}${more}`;

async function send(text) {
  if (!state.dialogue) {
    const { system, settings: own } = state.pending;
    const { id } = await api.post("/api/conversations", { text, system, settings: own });
    open(id);
    for (let tries = 0; !state.dialogue?.name; tries += 1) {
      if (tries > 500 || state.dialogue?.id !== id) throw new Error("the server does not answer");
      await new Promise((resolve) => setTimeout(resolve, 20)); // until the stream has told what was made
    }
  }
  const heads = [...state.dialogue.heads];
  if (sides().length === 1) return api.post(url("/ask"), { text, parent: heads[0], model: chosen(0), side: 0 });
  const first = await api.post(url("/ask"), { text, parent: heads[0], model: chosen(0), side: 0 });
  if (heads[0] === heads[1]) return api.post(url("/ask"), { parent: first.user, model: chosen(1), side: 1 });
  return api.post(url("/ask"), { text, parent: heads[1], model: chosen(1), side: 1 });
}

async function setting(changes) {
  if (state.dialogue) return api.patch(url(), { settings: changes });
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) delete state.pending.settings[name];
    else state.pending.settings[name] = value;
  }
  show();
  return {};
}

const acts = {
  async copy(id) {
    await trying(async () => {
      await navigator.clipboard.writeText(state.dialogue.nodes.get(id).content);
      note("Copied");
    });
  },
  async edit(id, which) {
    const node = state.dialogue.nodes.get(id);
    const hint = { user: "It is answered on a branch of its own; what was said stays.", system: "The conversation begins anew with it.", assistant: "Your words take its place, on a branch of their own." }[node.role];
    const text = await ask("Edit the message", { text: node.content, hint, ok: node.role === "user" ? "Send" : "Keep" });
    if (text === null || !text.trim() || text === node.content) return;
    await trying(() => {
      if (node.role === "system") return api.patch(url(), { system: text, side: which });
      if (node.role === "assistant") return api.post(url("/answer"), { id, text, side: which });
      return api.post(url("/ask"), { text, parent: node.parent, model: chosen(which), side: which });
    });
  },
  async retry(id, which) {
    const node = state.dialogue.nodes.get(id);
    await trying(async () => {
      await api.post(url("/ask"), { parent: node.parent, model: chosen(which), side: which });
      const own = settings().temperature ?? modelOf(chosen(which)).settings.temperature;
      if (own === 0 && node.model === chosen(which)) note("Temperature 0 gives the same answer again; settings change it.");
    });
  },
  async branch(id, which) {
    await trying(() => api.patch(url(), { head: state.dialogue.leaf(id), side: which }));
  },
  async train(id, train) {
    await trying(() => api.patch(url(), { train: { id, train } }));
  },
};
const panes = [new Pane(0, acts), new Pane(1, acts)];

// ---- settings

function showSettings() {
  const path = state.dialogue ? state.dialogue.path(0) : [];
  const system = path[0]?.role === "system" ? path[0].content : state.dialogue ? "" : state.pending.system;
  $("set-system").value = system;
  $("system-note").hidden = !path.length;
  const defaults = modelOf(chosen(0))?.settings || {};
  $("fields").replaceChildren(
    ...FIELDS.map(([name, label, hint]) => {
      const field = make("input", { id: `set-${name}`, inputmode: "decimal", autocomplete: "off", placeholder: String(defaults[name] ?? ""), title: hint });
      field.value = settings()[name] ?? "";
      return make("label", { text: label }, field);
    }),
  );
  $("set-stop").value = (settings().stop || []).join("\n");
  $("settings-error").textContent = "";
  $("settings").showModal();
}

async function keepSettings(event) {
  event.preventDefault();
  const changes = {};
  for (const [name, label] of FIELDS) {
    const text = $(`set-${name}`).value.trim();
    const value = text === "" ? null : Number(text.replace(",", "."));
    if (Number.isNaN(value)) {
      $("settings-error").textContent = `${label} is ${text}, expected a number`;
      return;
    }
    if (value !== (settings()[name] ?? null)) changes[name] = value;
  }
  const stop = $("set-stop").value.split("\n").filter(Boolean);
  if (stop.join("\n") !== (settings().stop || []).join("\n")) changes.stop = stop.length ? stop : null;
  const system = $("set-system").value;
  const path = state.dialogue ? state.dialogue.path(0) : [];
  const before = path[0]?.role === "system" ? path[0].content : state.dialogue ? "" : state.pending.system;
  try {
    if (Object.keys(changes).length) await setting(changes);
    if (system !== before && state.dialogue) await api.patch(url(), { system });
    if (!state.dialogue) state.pending.system = system;
    $("settings").close();
    panes.forEach((pane) => !state.dialogue && pane.clear());
    show();
  } catch (error) {
    $("settings-error").textContent = error.message;
  }
}

// ---- files

async function download(path, name) {
  await trying(async () => {
    const link = make("a", { download: name });
    link.href = URL.createObjectURL(await api.file(path));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

async function loadFile() {
  const file = $("file").files[0];
  if (!file) return;
  await trying(async () => {
    const { ids } = await api.post("/api/load", { name: file.name, text: await file.text() });
    await refresh();
    if (ids.length) open(ids[ids.length - 1]);
  });
  $("file").value = "";
}

// ---- events

function grow() {
  const field = $("text");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

async function submit(event) {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || state.busy || state.dialogue?.live.size) return;
  state.busy = true;
  $("text").value = "";
  grow();
  panes.forEach((pane) => pane.follow());
  const done = await trying(async () => (await send(text), true));
  state.busy = false;
  if (!done && !$("text").value) {
    $("text").value = text; // nothing that was typed is lost
    grow();
  }
  trying(refresh).then(() => done || note($("note").textContent, true));
}

async function stop() {
  const live = [...(state.dialogue?.live.keys() || [])];
  await trying(() => Promise.all(live.map((id) => api.post(url("/stop"), { id }))));
}

function menu(opened) {
  $("menu").hidden = !opened;
  $("more").setAttribute("aria-expanded", opened);
  if (opened) $("menu").querySelector("button").focus();
}

function keys(event) {
  if (event.key === "Escape" && !$("menu").hidden) {
    menu(false);
    $("more").focus();
  } else if (event.key === "Escape" && document.body.classList.contains("side-open")) {
    side(false);
    $("open-side").focus();
  } else if (event.key === "Escape" && state.dialogue?.live.size && !document.querySelector("dialog[open]")) stop();
  else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    open("");
  }
  const items = [...$("menu").querySelectorAll("button")];
  if (!$("menu").hidden && ["ArrowDown", "ArrowUp"].includes(event.key)) {
    event.preventDefault();
    const step = event.key === "ArrowDown" ? 1 : items.length - 1;
    items[(items.indexOf(document.activeElement) + step) % items.length].focus();
  }
}

async function rename() {
  const name = await ask("Rename the conversation", { text: state.dialogue.name, line: true });
  if (name) await trying(() => api.patch(url(), { name }));
}

async function erase() {
  const sure = await ask(`Delete “${state.dialogue.name}”?`, { confirm: true, ok: "Delete", hint: "It is removed from the server's disk with all its branches." });
  if (sure) await trying(() => api.remove(url()));
}

async function compare() {
  const on = !settings().compare;
  const other = state.models.find((model) => model.id !== chosen(0))?.id || chosen(0);
  await trying(async () => {
    await setting({ compare: on ? other : null });
    if (on && state.dialogue) await api.patch(url(), { head: state.dialogue.heads[0], side: 1 });
  });
}

function listen() {
  $("form").addEventListener("submit", submit);
  $("text").addEventListener("input", grow);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) submit(event);
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => open(""));
  $("filter").addEventListener("input", showList);
  $("open-side").addEventListener("click", () => side(true));
  for (const id of ["close-side", "shade"]) $(id).addEventListener("click", () => side(false));
  $("more").addEventListener("click", () => menu($("menu").hidden));
  $("menu").addEventListener("click", () => menu(false));
  document.addEventListener("click", (event) => event.target.closest(".menu") || menu(false));
  document.addEventListener("keydown", keys);
  $("rename").addEventListener("click", rename);
  $("delete").addEventListener("click", erase);
  $("export").addEventListener("click", () => download(url("/rows"), "rows.jsonl"));
  $("save").addEventListener("click", () => download(url("/file"), "conversation.jsonl"));
  $("export-all").addEventListener("click", () => download("/api/rows", "rows.jsonl"));
  $("load").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", loadFile);
  $("compare").addEventListener("click", compare);
  $("model").addEventListener("change", () => trying(() => setting({ model: $("model").value })));
  $("other").addEventListener("change", () => trying(() => setting({ compare: $("other").value })));
  $("settings-open").addEventListener("click", showSettings);
  $("settings-cancel").addEventListener("click", () => $("settings").close());
  $("settings").querySelector("form").addEventListener("submit", keepSettings);
  $("ask-cancel").addEventListener("click", () => $("ask").close(""));
  $("ask").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("ask").close("ok");
  });
  $("panes").addEventListener("click", async (event) => {
    const copy = event.target.closest(".copy-code");
    if (!copy) return;
    await trying(() => navigator.clipboard.writeText(copy.closest(".code").querySelector("code").textContent));
    note("Copied");
  });
  addEventListener("hashchange", () => location.hash.slice(1) !== (state.dialogue?.id || "") && open(location.hash.slice(1)));
}

async function begin() {
  try {
    state.models = (await api.get("/api/info")).models;
    await refresh();
  } catch (error) {
    if (error.status === 401) return askKey();
    note(error.status === 503 ? "The model is being loaded …" : error.message, error.status !== 503);
    setTimeout(begin, 1000);
    return undefined;
  }
  note("");
  for (const id of ["model", "other"]) {
    const options = state.models.map((model) => make("option", { value: model.id, text: model.parent ? `${model.id} (of ${model.parent})` : model.id }));
    $(id).replaceChildren(...options);
  }
  $("compare").hidden = state.models.length < 2;
  open(decodeURIComponent(location.hash.slice(1)));
  showList();
  return undefined;
}

$("panes").append(panes[0].node, panes[1].node);
listen();
begin();
