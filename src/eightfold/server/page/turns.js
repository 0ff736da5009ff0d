// ---- What is open, and what is coming.

let chat = newChat();
let run = null;  // the answer that is coming: its chat, message and view, and what stops it

const ENDS = { length: "cut off at its longest", stopped: "stopped" };
const isTouch = matchMedia("(pointer: coarse)"), isWide = matchMedia("(min-width: 860px)");

function showNames() {
  const name = models.length ? nameOfModel() : "Eightfold", most = chosenModel().max_model_len, part = most && chat.used ? chat.used / most : 0;
  $("title").textContent = chat.title;
  $("model").textContent = models.length ? name : "";
  document.title = chat.messages.length ? `${chat.title} · ${name}` : name;
  $("empty").hidden = chat.messages.length > 0;
  $("context").hidden = !part;
  $("used").textContent = part ? `${format(chat.used)} / ${format(most)}` : "";
  $("filled").style.width = Math.min(100 * part, 100) + "%";
  $("filled").className = part > 0.75 ? "much" : "";
}

// ---- Notices. What went wrong stands above the box until something better happens.

function notice(text, ways = []) { tell($("notice"), text, ways); }
function toast(text, ways = []) { tell($("toast"), text, ways); }
function hideNotices() { $("notice").hidden = $("toast").hidden = true; }

function tell(box, text, ways) {
  const shut = button("", "way", "close");
  shut.setAttribute("aria-label", "Dismiss");
  const buttons = [...ways.map(([name, action]) => [button(name, "way"), action]), [shut, () => {}]];
  for (const [made, action] of buttons) made.onclick = () => { box.hidden = true; focusBox(); action(); };
  box.replaceChildren(element("span", "", text), grouped(buttons.map(([made]) => made)));
  box.hidden = false;
}

function complain(error, again) {
  notice(error.message, again && !error.needsKey ? [["Try again", again]] : []);
  if (error.needsKey) askForKey(error.message);
}

function grouped(buttons) {
  const box = element("div", "buttons");
  box.append(...buttons);
  return box;
}

function trouble(text, buttons) {
  const box = element("div", "broken");
  box.append(element("span", "", text), grouped(buttons));
  return box;
}

// On a touch screen the box would bring the keyboard with it.
function focusBox() { (isTouch.matches ? $("main") : $("say")).focus({ preventScroll: true }); }

// ---- The conversation on the page.

const turns = () => Array.from($("log").querySelectorAll(".turn"));
const atEnd = () => $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < 60;

function toEnd() { $("main").scrollTop = $("main").scrollHeight; }

// Change the page; who reads the end sees the end.
function around(change) {
  const follows = atEnd();
  change();
  if (follows) toEnd();
}

function drawTurn(message) {
  const isMine = message.role === "user", box = element("article", "turn " + (isMine ? "user" : "assistant"));
  const view = { message, box, body: element("div", isMine ? "text" : "markdown"), foot: element("div", "foot"), thoughts: null, shown: null };
  if (isMine) {
    view.body.dir = "auto";
    view.body.textContent = message.content;
  } else view.shown = new Shown(view.body, around);
  box.append(element("h2", "unseen", isMine ? "You" : nameOfModel()), view.body, view.foot);
  drawFoot(view);
  drawThoughts(view, false);
  return view;
}

const views = new WeakMap();  // of messages

function addTurn(message) {
  const view = drawTurn(message);
  $("log").append(view.box);
  views.set(message, view);
  return view;
}

function drawFoot({ box, foot, message }) {
  const isComing = run?.message === message, isBroken = message.ends === "broken" && !isComing, acts = element("div", "acts");
  box.classList.toggle("coming", isComing);
  box.setAttribute("aria-busy", String(isComing));
  foot.replaceChildren(acts);
  if (message.role === "user") return acts.append(button("Edit", "edit", "edit"), button("Copy", "copy", "copy"));
  const facts = element("div", "facts"), again = [button(isBroken ? "Retry" : "Regenerate", "regenerate", "again")];
  foot.append(facts);
  if (isComing) return;
  if (message.ends && message.content && chat.messages.at(-1) === message) again.push(button("Continue", "continue", "more"));
  if (message.content) acts.append(button("Copy", "copy", "copy"));
  if (isBroken) foot.prepend(trouble(message.problem, again));
  else acts.append(...again);
  const empty = message.content || message.ends ? "" : "an empty answer";
  facts.textContent = [message.facts, ENDS[message.ends], empty].filter(Boolean).join(", ");
}

function drawThoughts(view, isThinking) {
  const { reasoning, thought } = view.message;
  if (!reasoning) return;
  if (!view.thoughts) {
    view.thoughts = element("details", "thoughts");
    view.thoughts.append(element("summary"), element("div", "text"));
    view.thoughts.lastChild.dir = "auto";
    view.body.before(view.thoughts);
  }
  const [summary, text] = view.thoughts.children;
  summary.textContent = isThinking ? "Thinking…" : thought === undefined ? "Thoughts" : `Thought for ${thought} s`;
  patch(text, [document.createTextNode(reasoning.trim())]);
}

let drawing = 0;  // so that of several drawings that wait for the server only the last is made

async function drawChat() {
  const mine = ++drawing, answers = chat.messages.filter((each) => each.role === "assistant" && each !== run?.message);
  const blocks = new Map();
  for (const each of batches(answers)) {
    const found = await Promise.race([rendered(each.map((message) => message.content)), pause(1500)]) || [];
    each.forEach((message, at) => blocks.set(message, found[at]));
  }
  if (mine !== drawing) return;
  $("log").replaceChildren();
  for (const message of chat.messages) {
    const view = addTurn(message);
    if (run?.message === message) run.view = view;
    else view.shown?.whole(message.content, blocks.get(message));
  }
  markLast();
  markForgotten();
  showNames();
  $("main").scrollTop = chat.messages.length ? $("main").scrollHeight : 0;
}

// Put texts together that the server renders at once.
function batches(messages) {
  const found = [];
  let size = Infinity;
  for (const message of messages) {
    size += message.content.length;
    if (size > 100_000) { found.push([]); size = message.content.length; }
    found.at(-1).push(message);
  }
  return found;
}

function markLast() {
  $("log").querySelector(":scope > .broken")?.remove();
  if (chat.messages.at(-1)?.role === "user" && !run) $("log").append(trouble("This has no answer yet.", [button("Ask again", "answer", "again")]));
}

function markForgotten() {
  $("log").querySelector(".forgotten")?.remove();
  turns().forEach((each, at) => each.classList.toggle("unsent", at < chat.from));
  if (chat.from) turns()[chat.from]?.before(element("p", "forgotten", "The turns above are no longer sent: the model’s context is full."));
}

// ---- What a person does with a turn.

const ACTIONS = {
  copy: (at, made) => copied(made, chat.messages[at].content),
  "copy-code": (at, made) => copied(made, made.closest(".block").querySelector("code").textContent),
  edit: (at) => edit(at),
  cancel: (at, made) => { made.closest(".turn").replaceWith(drawTurn(chat.messages[at]).box); turns()[at].querySelector("button").focus(); },
  regenerate: (at) => redo(at),
  continue: (at) => proceed(at),
  answer: () => redo(chat.messages.length - 1),
};

async function copied(made, text) {
  await copyText(text);
  made.lastChild.data = "Copied";
  $("spoken").textContent = "Copied.";
  setTimeout(() => { made.lastChild.data = "Copy"; }, 1500);
}

function edit(at, text = chat.messages[at].content) {
  if (run) return;
  const form = element("form", "editor"), area = element("textarea"), row = element("div", "buttons");
  const cancel = button("Cancel", "cancel"), done = element("button", "main", "Send");
  Object.assign(area, { value: text, dir: "auto" });
  area.setAttribute("aria-label", "Your message, edited");
  row.append(element("span", "note", chat.messages.length > at + 1 ? "What comes after is replaced." : ""), grouped([cancel, done]));
  form.append(area, row);
  form.onsubmit = (event) => { event.preventDefault(); if (area.value.trim()) redo(at, area.value.trim()); };
  area.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel.click(); }
    else if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
  };
  area.oninput = () => grow(area);
  turns()[at].replaceChildren(form);
  grow(area);
  area.focus();
}
