// Messages as elements; those that did not change stay as they are, and of one that grows only its end is made anew.

import { finished, folded, render, visible } from "./markdown.js";

const ENDINGS = { length: "cut off", abort: "stopped", error: "failed" };

export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key === "text") made.append(visible(value));
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function button(label, text, act, more = {}) {
  return make("button", { type: "button", "aria-label": label, title: label, onclick: act, text, ...more });
}

class Body {
  constructor() {
    this.thoughts = make("details", { class: "thoughts", hidden: true });
    this.summary = make("summary");
    this.inner = make("div", { class: "inner" });
    this.thoughts.append(this.summary, this.inner);
    this.fixed = make("div");
    this.open = make("div");
    this.node = make("div", { class: "body" }, this.thoughts, this.fixed, this.open);
    this.done = 0;
    this.shown = null;
  }

  show(text, plain, begun) {
    if (text === this.shown) return;
    if (this.shown !== null && !text.startsWith(this.shown)) {
      this.fixed.replaceChildren();
      this.done = 0;
    }
    this.shown = text;
    if (plain) {
      this.open.replaceChildren(make("p", { class: "plain", text }));
      return;
    }
    const found = folded(text, begun);
    this.thoughts.hidden = found.thoughts === null;
    if (found.thoughts !== null) {
      const words = found.thoughts.split(/\s+/).filter(Boolean).length;
      this.summary.textContent = found.thinking ? `Thinking … ${words} words` : `Thought in ${words} words`;
      this.inner.replaceChildren(visible(found.thoughts));
    }
    const rest = found.rest.slice(this.done);
    const end = finished(rest);
    if (end) {
      this.fixed.append(...render(rest.slice(0, end)));
      this.done += end;
    }
    this.open.replaceChildren(...render(rest.slice(end)));
  }
}

class Message {
  constructor(node, side, acts) {
    this.body = new Body();
    this.who = make("span", { class: "who" });
    this.branches = make("span", { class: "branches", role: "group", "aria-label": "Versions of this message" });
    this.meta = make("span", { class: "meta" });
    this.tools = make("div", { class: "tools" });
    this.tools.append(button("Copy the text", "Copy", () => acts.copy(node.id)));
    this.tools.append(button("Edit", "Edit", () => acts.edit(node.id, side)));
    if (node.role === "assistant") {
      this.tools.append(button("Answer again", "Retry", () => acts.retry(node.id, side)));
      this.train = make("input", { type: "checkbox", onchange: () => acts.train(node.id, this.train.checked) });
      this.tools.append(make("label", { class: "train", title: "Learned when exported as training rows" }, this.train, " Train"));
    }
    this.head = make("header", {}, this.who, this.branches);
    this.foot = make("footer", {}, this.tools, this.meta);
    this.node = make("article", { class: `message ${node.role}`, "data-id": node.id }, this.head, this.body.node, this.foot);
    this.acts = acts;
    this.side = side;
    this.state = "";
  }

  show(node, dialogue) {
    const live = dialogue.live.get(node.id);
    this.body.show(node.content, node.role !== "assistant", node.opened);
    const siblings = dialogue.siblings(node);
    const index = siblings.indexOf(node.id);
    const ending = live ? "" : node.role !== "assistant" ? "" : node.finish_reason === null ? "interrupted" : ENDINGS[node.finish_reason] || "";
    const speed = !live && node.tokens && node.seconds ? `${node.tokens} tokens · ${(node.tokens / node.seconds).toFixed(1)} tokens/s` : "";
    const going = live ? `${live.tokens || 0} tokens · ${((live.tokens || 0) / Math.max(0.1, (performance.now() - live.start) / 1000)).toFixed(1)} tokens/s` : "";
    const forgotten = node.forgotten ? `${node.forgotten} oldest turns were not read` : "";
    this.meta.textContent = [going || speed, ending, forgotten].filter(Boolean).join(" · ");
    const state = JSON.stringify([siblings, index, !!live, dialogue.trained(node), node.model]);
    if (state === this.state) return;
    this.state = state;
    const name = { user: "You", system: "System" }[node.role] || node.model || "Assistant";
    this.who.replaceChildren(visible(name));
    this.node.setAttribute("aria-label", name);
    this.node.classList.toggle("live", !!live);
    this.node.setAttribute("aria-busy", live ? "true" : "false");
    this.branches.replaceChildren();
    if (siblings.length > 1) {
      this.branches.append(
        button("Version before", "‹", () => this.acts.branch(siblings[index - 1], this.side), { disabled: index === 0 }),
        make("span", { text: `${index + 1} / ${siblings.length}` }),
        button("Version after", "›", () => this.acts.branch(siblings[index + 1], this.side), { disabled: index === siblings.length - 1 }),
      );
    }
    if (this.train) this.train.checked = dialogue.trained(node);
    for (const tool of this.tools.querySelectorAll("button, input")) tool.disabled = !!live;
  }
}

// A branch of a conversation in an element.
export class Pane {
  constructor(side, acts) {
    this.side = side;
    this.acts = acts;
    this.title = make("div", { class: "pane-title" });
    this.list = make("div", { class: "list", role: "log", "aria-live": "off", tabindex: "0", "aria-label": "Messages" });
    this.node = make("section", { class: "pane" }, this.title, this.list);
    this.messages = new Map();
  }

  // Shows the end, and whatever comes there, until the user scrolls away from it.
  follow() {
    this.end = true;
  }

  clear() {
    this.messages.clear();
    this.list.replaceChildren();
  }

  show(dialogue, title, empty) {
    const path = dialogue ? dialogue.path(this.side) : [];
    const atEnd = this.end || this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 60;
    this.title.textContent = title;
    this.title.hidden = !title;
    const wanted = new Set(path.map((node) => node.id));
    for (const [id, message] of this.messages) {
      if (!wanted.has(id)) {
        message.node.remove();
        this.messages.delete(id);
      }
    }
    this.list.querySelector(".empty")?.remove();
    if (!path.length) this.list.append(empty());
    for (const [index, node] of path.entries()) {
      let message = this.messages.get(node.id);
      if (!message) {
        message = new Message(node, this.side, this.acts);
        this.messages.set(node.id, message);
      }
      if (this.list.children[index] !== message.node) this.list.insertBefore(message.node, this.list.children[index] || null);
      message.show(node, dialogue);
    }
    if (path.length && dialogue.live.has(path[path.length - 1].id)) this.end = false;
    if (atEnd) this.list.scrollTop = this.list.scrollHeight;
  }
}
