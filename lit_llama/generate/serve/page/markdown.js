// Markdown -> elements. Words of an answer reach the page as text of elements that are named here, and never as HTML:
// no attribute but the address of a link is made of them, and that one has to be http, https or mailto.

const ACTING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]/g;
const LONGEST = 20000; // characters of a block beyond which it is shown as it is
const MARKS = [
  [/^(`+)([^`]|[^`][^]*?[^`])\1(?!`)/, (m) => element("code", [visible(m[2].trim() || m[2])])],
  [/^\*\*(?=\S)([^]+?)\*\*(?!\*)/, (m, deep) => element("strong", inline(m[1], deep))],
  [/^__(?=\S)([^]+?\S)__(?!\w)/, (m, deep) => element("strong", inline(m[1], deep))],
  [/^~~(?=\S)([^]+?)~~/, (m, deep) => element("del", inline(m[1], deep))],
  [/^\*(?=[^\s*])([^*]+?)\*(?!\*)/, (m, deep) => element("em", inline(m[1], deep))],
  [/^_(?=[^\s_])([^_]+?)_(?!\w)/, (m, deep) => element("em", inline(m[1], deep))],
  [/^!?\[([^\]\n]{1,500})\]\(\s*<?([^\s<>()]{1,2000})>?(?:\s+"[^"\n]*")?\s*\)/, (m, deep) => link(m[2], inline(m[1], deep))],
  [/^<(https?:\/\/[^\s<>]{1,2000})>/, (m) => link(m[1], [visible(m[1])])],
  [/^https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,:;!?]/, (m) => link(m[0], [visible(m[0])])],
  [/^\\([\\`*_{}\[\]()#+\-.!~|<>])/, (m) => document.createTextNode(m[1])],
  [/^(?: {2,}|\\)\n/, () => element("br", [])],
];
const BEGINS = new Set("`*_~![<h\\ ");

export function visible(text) {
  const shown = text.replace(ACTING, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  return document.createTextNode(shown);
}

function element(name, children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return element("span", children);
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return element("span", children);
  const made = element("a", children);
  made.href = url.href;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  made.title = url.href;
  return made;
}

function inline(text, depth = 0) {
  if (depth > 8 || text.length > LONGEST) return [visible(text)];
  const found = [];
  let plain = "";
  const flush = () => {
    if (plain) found.push(visible(plain));
    plain = "";
  };
  let before = "";
  let tries = 0; // each looks far ahead at worst; beyond so many the rest is shown as it is
  for (let at = 0; at < text.length; ) {
    const c = text[at];
    let mark = null;
    if (BEGINS.has(c) && !(/\w/.test(before) && (c === "_" || c === "h")) && tries < 500) {
      tries += c === " " || c === "h" ? 0 : 1;
      const rest = text.slice(at);
      for (const [pattern, make] of MARKS) {
        const match = pattern.exec(rest);
        if (match) {
          mark = [match, make];
          break;
        }
      }
    }
    if (mark) {
      flush();
      found.push(mark[1](mark[0], depth + 1));
      at += mark[0][0].length;
      before = text[at - 1];
    } else {
      plain += c;
      before = c;
      at += 1;
    }
  }
  flush();
  return found;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30})/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ROW = /^\s*\|?(.+?)\|?\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const cells = (line) => ROW.exec(line)[1].split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));

function fence(lines, at, out) {
  const [, mark, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(mark) && lines[end].trim().replaceAll(mark[0], "") === ""))
    end += 1;
  const code = element("code", [visible(lines.slice(at + 1, end).join("\n"))]);
  const block = element("pre", [code]);
  block.tabIndex = 0;
  const box = element("div", [block]);
  box.className = "code";
  const head = element("div", [element("span", [visible(language || "code")])]);
  head.className = "code-head";
  const copy = element("button", [document.createTextNode("Copy")]);
  copy.type = "button";
  copy.className = "copy-code";
  head.append(copy);
  box.prepend(head);
  out.push(box);
  return end + 1;
}

function list(lines, at, out, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const made = document.createElement(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(mark, 10);
  let loose = at;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== ordered || RULE.test(lines[at])) break;
    const width = item[0].length;
    const own = [lines[at].slice(width)];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const inner = line.length - line.trimStart().length;
      if (line.trim() === "") {
        const next = lines[at + 1];
        if (next === undefined || (next.length - next.trimStart().length <= indent.length)) break;
      } else if (inner <= indent.length && (ITEM.test(line) || lines[at - 1].trim() === "" || FENCE.test(line))) break;
      own.push(line.slice(Math.min(width, inner)));
      at += 1;
    }
    const children = blocks(own, depth + 1);
    const single = children.length && children[0].tagName === "P" ? [...children[0].childNodes, ...children.slice(1)] : children;
    made.append(element("li", single));
    loose = at;
    while (at < lines.length && lines[at].trim() === "") at += 1;
    if (at < lines.length && !ITEM.test(lines[at])) break;
  }
  out.push(made);
  return Math.max(loose, 1);
}

function table(lines, at, out) {
  const head = cells(lines[at]);
  const row = (values, name) =>
    element("tr", head.map((_, index) => element(name, inline(values[index] ?? ""))));
  const made = element("table", [element("thead", [row(head, "th")])]);
  const body = document.createElement("tbody");
  at += 2;
  for (; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(cells(lines[at]), "td"));
  made.append(body);
  const box = element("div", [made]);
  box.className = "wide";
  box.tabIndex = 0;
  out.push(box);
  return at;
}

function blocks(lines, depth = 0) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const heading = /^ {0,3}(#{1,6})(?:\s+(.*?))?\s*#*\s*$/.exec(line.slice(0, LONGEST));
    if (line.trim() === "") at += 1;
    else if (depth > 12 || line.length > LONGEST) {
      out.push(element("p", [visible(line)]));
      at += 1;
    } else if (FENCE.test(line)) at = fence(lines, at, out);
    else if (heading) {
      out.push(element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2] || "")));
      at += 1;
    } else if (RULE.test(line)) {
      out.push(document.createElement("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line)) {
      const own = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) own.push(lines[at].replace(/^ {0,3}> ?/, ""));
      out.push(element("blockquote", blocks(own, depth + 1)));
    } else if (ITEM.test(line)) at = list(lines, at, out, depth);
    else if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1].slice(0, 2000)))
      at = table(lines, at, out);
    else {
      const own = [line];
      for (at += 1; at < lines.length; at += 1) {
        const next = lines[at];
        if (next.trim() === "" || FENCE.test(next) || ITEM.test(next) || RULE.test(next) || /^ {0,3}(>|#{1,6}\s)/.test(next)) break;
        own.push(next);
      }
      out.push(element("p", inline(own.join("\n"))));
    }
  }
  return out;
}

// Up to where nothing that comes later changes how a text is shown.
export function finished(text) {
  let open = "", position = 0, end = 0, empty = false;
  for (const line of text.split("\n")) {
    if (empty && !open && line !== "" && !/^\s/.test(line)) end = position;
    const mark = FENCE.exec(line);
    if (mark && !open) open = mark[1];
    else if (mark && mark[1].startsWith(open) && line.trim() === mark[1]) open = "";
    empty = line.trim() === "";
    position += line.length + 1;
  }
  return end;
}

export const render = (text) => blocks(text.split("\n"));

const OPENED = /^\s*(?:<(think|thinking|thought|thoughts|reasoning)>|\[THINK\])/;
const CLOSED = /<\/(?:think|thinking|thought|thoughts|reasoning)>|\[\/THINK\]/;

// Thoughts and answer: {thoughts, rest, thinking}; thoughts are null where there are none. `begun` if the prompt ends
// in the tag that begins them.
export function folded(text, begun) {
  const opened = OPENED.exec(text);
  if (!opened && !begun) return { thoughts: null, rest: text };
  const inner = opened ? text.slice(opened[0].length) : text;
  const closed = CLOSED.exec(inner);
  if (!closed) return { thoughts: inner.trim(), rest: "", thinking: true };
  return { thoughts: inner.slice(0, closed.index).trim(), rest: inner.slice(closed.index + closed[0].length).trimStart() };
}
