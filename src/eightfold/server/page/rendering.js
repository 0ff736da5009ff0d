// ---- Elements. Text only ever becomes text nodes; of what the server has rendered, only known elements are copied.

const $ = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function icon(name) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg"), use = document.createElementNS(made.namespaceURI, "use");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  use.setAttribute("href", "#i-" + name);
  made.append(use);
  return made;
}

// A button; what it does is found by its data-do, so that it may be made and copied anywhere.
function button(text, action, iconName) {
  const made = element("button");
  made.type = "button";
  made.dataset.do = action;
  if (iconName) made.append(icon(iconName));
  made.append(text);
  return made;
}

// The page's own headings come first, so an answer's begin at the third level.
const KNOWN = {
  P: "p", BR: "br", HR: "hr", H1: "h3", H2: "h4", H3: "h5", H4: "h6", H5: "h6", H6: "h6", UL: "ul", OL: "ol", LI: "li",
  BLOCKQUOTE: "blockquote", PRE: "pre", CODE: "code", EM: "em", STRONG: "strong", S: "s", A: "a", SPAN: "span",
  TABLE: "table", THEAD: "thead", TBODY: "tbody", TR: "tr", TH: "th", TD: "td",
};

function cleaned(html) {
  return Array.from(new DOMParser().parseFromString(html, "text/html").body.childNodes).flatMap(clean);
}

function clean(node) {
  if (node.nodeType === Node.TEXT_NODE) return [document.createTextNode(node.data)];
  if (node.nodeType !== Node.ELEMENT_NODE || /^(SCRIPT|STYLE|TEMPLATE|IFRAME)$/.test(node.tagName)) return [];
  const inside = Array.from(node.childNodes).flatMap(clean), tag = Object.hasOwn(KNOWN, node.tagName) && KNOWN[node.tagName];
  if (tag === "pre") return [codeBlock(node)];
  const link = node.getAttribute("href") || "";
  if (!tag || (tag === "a" && !/^(https?:|mailto:)/i.test(link))) return inside;
  const made = element(tag);
  if (tag === "a") Object.assign(made, { href: link, target: "_blank", rel: "noopener noreferrer" });
  if (tag === "ol" && /^\d{1,9}$/.test(node.getAttribute("start"))) made.setAttribute("start", node.getAttribute("start"));
  if (/^(left|right|center|formula)$/.test(node.className)) made.className = node.className;
  made.append(...inside);
  return tag === "table" ? [scrollable(made)] : [made];
}

function scrollable(table) {
  const box = element("div", "wide");
  box.append(table);
  return reachable(box, "Table");
}

// What scrolls can be reached by keyboard.
function reachable(box, name) {
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", name);
  return box;
}

function codeBlock(pre) {
  const box = element("div", "block"), bar = element("div", "bar"), made = element("pre");
  const language = /(?:^|\s)language-(\S{1,40})/.exec(pre.firstElementChild?.className || "");
  bar.append(element("span", "", language ? language[1] : "code"), button("Copy", "copy-code", "copy"));
  made.dir = "ltr";
  made.append(element("code", "", pre.textContent.replace(/\n$/, "")));
  box.append(bar, reachable(made, "Code"));
  return box;
}

// Make an element's content what is wanted and leave alone what is right already: nothing flickers or loses its selection.
function patch(box, wanted) {
  wanted.forEach((node, at) => {
    const old = box.childNodes[at];
    if (!old) box.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (node.nodeType !== Node.TEXT_NODE) { patchAttributes(old, node); patch(old, Array.from(node.childNodes)); }
    else if (node.data.startsWith(old.data)) { if (node.length > old.length) old.appendData(node.data.slice(old.length)); }
    else old.data = node.data;
  });
  while (box.childNodes.length > wanted.length) box.lastChild.remove();
}

function patchAttributes(old, node) {
  for (const { name } of Array.from(old.attributes)) if (!node.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of node.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
}

// Make a list of elements the children of a box, moving none that is in its place.
function patchList(box, wanted) {
  wanted.forEach((node, at) => { if (box.childNodes[at] !== node) box.insertBefore(node, box.childNodes[at] || null); });
  while (box.childNodes.length > wanted.length) box.lastChild.remove();
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// The text of an answer on the page. While it grows, only its last two blocks are rendered again.
class Shown {
  constructor(box, around) {
    this.box = box;
    this.around = around;  // calls what changes the page, and keeps the place that is read
    this.text = "";
    this.until = 0;  // how much of the text is rendered
    this.blocks = [];  // the elements, and where in the text each begins
    this.rest = element("div", "rest");  // text that is not rendered yet
    this.work = null;
    this.end = () => {};
    this.renderedAt = performance.now();
  }

  grow(text) {
    this.text = text.replace(/\r\n?/g, "\n");
    this.work ||= this.follow().finally(() => { this.work = null; });
    // The server may be slow: what it owes is shown as it is.
    if (performance.now() - this.renderedAt > 700) this.around(() => this.showRest(true));
  }

  async follow() {
    const ending = new Promise((resolve) => { this.end = resolve; });
    while (this.until < this.text.length) {
      const from = this.blocks.at(-2)?.from ?? 0, until = this.text.length, begin = performance.now();
      const [blocks] = await rendered([this.text.slice(from, until)]);
      if (blocks) this.put(blocks, from, until);
      else this.around(() => this.showRest(true));
      await Promise.race([pause(Math.min(Math.max(150, 6 * (performance.now() - begin)), 2000)), ending]);
      if (!blocks) return;
    }
  }

  // Once more from the beginning: a link may be defined at the end.
  async finish(text) {
    this.end();
    await this.work;
    const [blocks] = await rendered([text]);
    this.around(() => this.whole(text, blocks));
  }

  whole(text, blocks) {
    this.text = text.replace(/\r\n?/g, "\n");
    if (blocks) this.put(blocks, 0, this.text.length);
    else this.showRest(true);
  }

  put(blocks, from, until) {
    const starts = [from];
    for (let at = this.text.indexOf("\n", from); at >= 0 && at < until; at = this.text.indexOf("\n", at + 1)) starts.push(at + 1);
    const before = this.blocks.filter((each) => each.from < from);
    const after = blocks.map(({ line, html }, at) => {
      const part = this.blocks[before.length + at]?.part ?? element("div", "part");
      part.dir = "auto";
      return { from: starts[line] ?? from, part, html };
    });
    this.around(() => {
      for (const { part, html } of after) patch(part, cleaned(html));
      this.blocks = [...before, ...after];
      this.until = until;
      this.renderedAt = performance.now();
      this.showRest(false);
      patchList(this.box, [...this.blocks.map((each) => each.part), this.rest]);
    });
  }

  showRest(isLate) {
    this.rest.textContent = isLate ? this.text.slice(this.until) : "";
    if (!this.rest.parentNode) this.box.append(this.rest);
  }
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = element("textarea", "unseen", text);  // a page without TLS has no clipboard
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}
