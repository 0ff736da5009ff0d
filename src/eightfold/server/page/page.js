// ---- What is open, and what is coming.

let chat = newChat();
let run = null;  // the answer that is coming: its chat, message, view, and what stops it
let lost = null;  // why chats are not kept
const IDEAS = ["Explain int8 quantization in three sentences", "Compare tea and coffee in a table", "Write a haiku about the number eight"];
const USUAL = { system: "", temperature: "0.7", top_p: "", most: "" };
const ENDS = { length: "cut off at its longest", stopped: "stopped" };

const isTouch = matchMedia("(pointer: coarse)"), isWide = matchMedia("(min-width: 860px)");
const chosenModel = () => models.find((each) => each.id === $("which").value) || models[0] || {};
const nameOfModel = () => chosenModel().id || "the model";
const turnAt = (at) => $("log").querySelectorAll(".turn")[at];
const isLast = (message) => chat.messages.at(-1) === message;

async function loadModels() {
  try {
    models = (await (await call("v1/models")).json()).data;
    $("which").replaceChildren(...models.map((each) => new Option(each.id, each.id)));
    if (models.some((each) => each.id === recall("localStorage", "which"))) $("which").value = recall("localStorage", "which");
    $("modelbox").hidden = models.length < 2;
    const chats = models.length && chosenModel().has_chat_template;
    if (!chats) notice("This model has no chat template: it continues texts through the API, but cannot chat. Start the server with --chat-template FILE.", [["Look again", loadModels]]);
    else hideNotice();
    $("say").disabled = $("send").disabled = !chats;
    showNames();
    return true;
  } catch (error) {
    complain(error, loadModels);
    return false;
  }
}

function showNames() {
  $("title").textContent = chat.title;
  $("model").textContent = models.length ? nameOfModel() : "";
  document.title = [chat.messages.length ? chat.title : null, models.length ? nameOfModel() : "Eightfold"].filter(Boolean).join(" · ");
  $("empty").hidden = chat.messages.length > 0;
  const most = chosenModel().max_model_len, part = most && chat.used ? chat.used / most : 0;
  $("context").hidden = !part;
  $("used").textContent = part ? `${format(chat.used)} / ${format(most)}` : "";
  $("filled").style.width = Math.min(100 * part, 100) + "%";
  $("filled").className = part > 0.75 ? "much" : "";
}

// ---- Notices: what went wrong stands above the box until something better happens.

function notice(text, ways = []) { tell($("notice"), text, ways); }

function toast(text, ...way) { tell($("toast"), text, way.length ? [way] : []); }

function tell(box, text, ways) {
  const shut = button("", "way", "close");
  shut.setAttribute("aria-label", "Dismiss");
  const buttons = [...ways.map(([name, action]) => [button(name, "way"), action]), [shut, () => {}]];
  for (const [made, action] of buttons) made.onclick = () => { box.hidden = true; focusBox(); action(); };
  box.replaceChildren(element("span", "", text), grouped(buttons.map(([made]) => made)));
  box.hidden = false;
}

function hideNotice() { $("notice").hidden = true; }

function complain(error, again) {
  notice(error.message || String(error), again && !error.needsKey ? [["Try again", again]] : []);
  if (error.needsKey) askForKey(error.message);
}

function hideToast() { $("toast").hidden = true; }

function focusBox() { if (!isTouch.matches) $("say").focus(); else $("main").focus({ preventScroll: true }); }

// ---- The conversation on the page.

function atEnd() { return $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < 60; }

function around(change) {
  const follows = atEnd();
  change();
  if (follows) $("main").scrollTop = $("main").scrollHeight;
}

function toEnd() { $("main").scrollTop = $("main").scrollHeight; }

function drawTurn(message) {
  const isMine = message.role === "user", box = element("article", "turn " + (isMine ? "user" : "assistant"));
  const body = element("div", isMine ? "text" : "markdown"), foot = element("div", "foot");
  box.append(element("h2", "unseen", isMine ? "You" : nameOfModel()));
  const view = { box, body, foot, thoughts: null, shown: null, message };
  if (isMine) {
    body.dir = "auto";
    body.textContent = message.content;
  } else view.shown = new Shown(body, around);
  box.append(body, foot);
  $("log").append(box);
  drawFoot(view);
  return view;
}

function drawFoot({ box, body, foot, message }) {
  const isComing = run?.message === message, isBroken = message.ends === "broken";
  const acts = element("div", "acts"), facts = [message.facts, ENDS[message.ends]];
  foot.replaceChildren();
  box.classList.toggle("coming", isComing);
  if (message.role === "user") acts.append(button("Edit", "edit", "edit"), button("Copy", "copy", "copy"));
  else if (!isComing) {
    const again = [button(isBroken ? "Retry" : "Regenerate", "regenerate", "again")];
    if (message.ends && message.content && isLast(message)) again.push(button("Continue", "continue", "more"));
    if (message.content) acts.append(button("Copy", "copy", "copy"));
    if (isBroken) foot.append(trouble(message.problem, again));
    else acts.append(...again);
    if (!message.content && !message.ends) facts.push("an empty answer");
  }
  foot.append(acts);
  if (message.role !== "user") foot.append(element("div", "facts", isComing ? "" : facts.filter(Boolean).join(", ")));
  box.setAttribute("aria-busy", String(isComing));
}

function drawThoughts(view, isThinking) {
  const { message } = view;
  if (!message.reasoning) return;
  if (!view.thoughts) {
    view.thoughts = element("details", "thoughts");
    view.thoughts.append(element("summary"), element("div", "text"));
    view.thoughts.lastChild.dir = "auto";
    view.body.before(view.thoughts);
  }
  const [summary, text] = view.thoughts.children;
  summary.textContent = isThinking ? "Thinking…" : message.thought === undefined ? "Thoughts" : `Thought for ${message.thought} s`;
  patch(text, [document.createTextNode(message.reasoning.trim())]);
}

let drawing = 0;  // counts, so that only the last of several begun at a time is finished

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
    const view = drawTurn(message);
    drawThoughts(view, false);
    if (run?.message === message) run.view = view;
    else if (view.shown) showWhole(view.shown, message.content, blocks.get(message));
  }
  if (chat.messages.at(-1)?.role === "user") $("log").append(trouble("This has no answer yet.", [button("Ask again", "answer", "again")]));
  markForgotten();
  showNames();
  $("main").scrollTop = chat.messages.length ? $("main").scrollHeight : 0;
}

function showWhole(shown, text, blocks) {
  shown.text = text.replace(/\r\n?/g, "\n");
  if (blocks) shown.put(blocks, 0, shown.text.length);
  else shown.showRest(true);
}

// Texts that are small enough to be rendered together.
function batches(messages) {
  const found = [[]];
  let size = 0;
  for (const message of messages) {
    size += message.content.length;
    if (size > 100_000 && found.at(-1).length) { found.push([]); size = message.content.length; }
    found.at(-1).push(message);
  }
  return found.filter((each) => each.length);
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

function markForgotten() {
  $("log").querySelector(".forgotten")?.remove();
  $("log").querySelectorAll(".turn").forEach((each, at) => each.classList.toggle("unsent", at < chat.from));
  if (chat.from) turnAt(chat.from)?.before(element("p", "forgotten", "The turns above are no longer sent: the model’s context is full."));
}

// ---- Changes. Each can be taken back as long as the page is open, and is where the server refuses it.

const stateOf = (which) => structuredClone({ messages: which.messages, from: which.from, used: which.used, title: which.title });

function restore(which, state) {
  if (run?.chat === which) { run.isDropped = true; stop(); }
  Object.assign(which, structuredClone(state));
  save(which);
  if (which === chat) return drawChat();
}

function save(which = chat) {
  const id = which.id, was = lost;
  lost = keep(which);
  if (which.id !== id) toast("Another tab has changed this chat meanwhile, so both are kept.");
  if (which === chat) remember("sessionStorage", "open", chat.id);
  if (lost === "full" && was !== "full") notice("The browser’s storage is full: this chat is not kept. Export or delete some.", [["Chats", showChats]]);
  drawList();
}

async function send() {
  const text = $("say").value.trim();
  if (!text || run) return;
  const before = stateOf(chat);
  if (!chat.messages.length && !chat.isNamed) chat.title = titleFrom(text);
  chat.messages.push({ role: "user", content: text });
  setBox("");
  hideToast();
  $("log").querySelector(":scope > .broken")?.remove();
  drawTurn(chat.messages.at(-1));
  await answer(before, (which) => which === chat && setBox([text, $("say").value].filter(Boolean).join("\n")), send);
}

// Go on from a message of mine with another text, or from an answer with another answer.
async function redo(at, text) {
  if (run) return;
  const before = stateOf(chat), was = chat, message = chat.messages[at];
  const end = message.role === "user" ? at + 1 : at;
  const isLoss = chat.messages.slice(end).some((each) => each.content) || text !== undefined;
  if (text !== undefined) chat.messages[at] = { role: "user", content: text };
  chat.messages = chat.messages.slice(0, end);
  chat.from = Math.min(chat.from, Math.max(end - 1, 0));
  if (text !== undefined && at === 0 && !chat.isNamed) chat.title = titleFrom(text);
  await drawChat();
  $("log").querySelector(":scope > .broken")?.remove();
  if (isLoss) toast("What came after is replaced.", "Undo", () => restore(was, before));
  await answer(before, async (which) => {
    hideToast();
    if (text !== undefined && which === chat) { await drawn; edit(at, text); }
  }, () => redo(at, text));
}

let drawn = null;  // the page after what was taken back

function stop() { run?.controller.abort(); }

// ---- An answer.

class Progress {
  constructor(message) {
    this.message = message;
    this.prefix = message.content;  // of an answer that is continued
    this.text = "";
    this.begin = performance.now();
    this.first = this.last = this.thoughtFrom = this.tokens = 0;
    this.ends = null;
  }

  // Take an event of the stream; return whether it brought text.
  take(event) {
    if (event.usage) Object.assign(this, { tokens: event.usage.completion_tokens, used: event.usage.prompt_tokens + event.usage.completion_tokens });
    const choice = event.choices?.[0], { content, reasoning_content: reasoning } = choice?.delta || {};
    this.ends = choice?.finish_reason || this.ends;
    if (!content && !reasoning) return false;
    this.tokens += 1;  // about; the usage at the end says how many they are
    this.last = performance.now();
    this.first ||= this.last;
    const { message } = this;
    if (reasoning) message.reasoning = (message.reasoning || "") + reasoning;
    this.text += content || "";
    const split = this.prefix ? null : withoutThoughts(this.text);
    if (split?.reasoning) message.reasoning = split.reasoning;
    message.content = this.prefix + (split ? split.content : this.text);
    this.isThinking = Boolean(message.reasoning) && !message.content;
    if (this.isThinking) this.thoughtFrom ||= this.last;
    else if (this.thoughtFrom && message.thought === undefined) message.thought = Math.max(1, Math.round((this.last - this.thoughtFrom) / 1000));
    return true;
  }

  facts() {
    const rate = this.tokens > 1 && this.last > this.first ? (this.tokens - 1) / (this.last - this.first) * 1000 : 0;
    const first = "first after " + ((this.first - this.begin) / 1000).toFixed(2) + " s";
    return [format(this.tokens) + (this.tokens === 1 ? " token" : " tokens"), rate ? rate.toFixed(1) + " tok/s" : "", first].filter(Boolean).join(", ");
  }
}

// Split thoughts off that the server has left in the text: <think> ... </think> at its beginning.
function withoutThoughts(text) {
  const trimmed = text.trimStart();
  if ("<think>".startsWith(trimmed.slice(0, 7)) && trimmed.length < 7) return { reasoning: "", content: "" };
  if (!trimmed.startsWith("<think>")) return null;
  const [reasoning, ...rest] = trimmed.slice(7).split("</think>");
  return { reasoning, content: rest.join("</think>").trimStart() };
}

async function answer(before, putBack, again, continues = null) {
  const message = continues || { role: "assistant", content: "" }, own = { ...message };
  const mine = run = { chat, message, controller: new AbortController(), isDropped: false, view: null };
  const progress = new Progress(message);
  hideNotice();
  save();  // what another tab shows meanwhile
  if (!continues) chat.messages.push(message);
  delete message.ends;
  busy(true);
  mine.view = continues ? viewOf(message) : drawTurn(message);
  drawFoot(mine.view);
  toEnd();
  let problem = null;
  try {
    if (!models.length && !await loadModels()) throw new Problem("The server cannot be reached. Is it still running?", { canWait: true });
    await fit(mine.chat, mine.controller.signal);
    if (mine.chat === chat) { markForgotten(); showNames(); }
    const response = await call("v1/chat/completions", question(mine.chat, continues), mine.controller.signal);
    await follow(response, progress, mine);
  } catch (error) {
    problem = error.name === "AbortError" || mine.controller.signal.aborted ? "stopped" : error;
  }
  if (mine.isDropped) return;
  const isRefused = problem && problem !== "stopped" && !progress.first;
  run = null;
  busy(false);
  if (isRefused) {
    Object.assign(message, own);
    drawn = restore(mine.chat, before);
    putBack(mine.chat);
    if (mine.chat === chat) complain(problem, again);
    return;
  }
  Object.assign(message, { ends: problem === "stopped" ? "stopped" : problem ? "broken" : progress.ends === "length" ? "length" : undefined });
  message.problem = message.ends === "broken" ? problem.message : undefined;
  message.facts = progress.first ? progress.facts() : undefined;
  if (problem === "stopped" && !message.content && !message.reasoning) mine.chat.messages = mine.chat.messages.filter((each) => each !== message);
  mine.chat.used = progress.used || mine.chat.used;
  save(mine.chat);
  if (mine.chat !== chat) return;
  await finish(mine, progress);
}

// Show what a stream brings, and keep it now and then, as if this page ended.
async function follow(response, progress, mine) {
  let keptAt = performance.now(), frame = 0;
  const draw = () => {
    frame = 0;
    if (mine.chat !== chat || mine.isDropped) return;
    around(() => drawThoughts(mine.view, progress.isThinking));
    mine.view.shown.grow(mine.message.content);
  };
  try {
    for await (const event of events(response)) {
      if (!event) mine.view.foot.querySelector(".facts").textContent = "waiting for a turn";
      if (!event || !progress.take(event)) continue;
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - keptAt < 1000) continue;
      keptAt = performance.now();
      const { message } = mine;
      Object.assign(message, { ends: "broken", problem: "This answer was not complete when it was last kept." });
      if (!mine.isDropped) keep(mine.chat);
      delete message.ends;
    }
  } finally {
    cancelAnimationFrame(frame);
    draw();
  }
}

async function finish({ view, message }, progress) {
  if (!chat.messages.includes(message)) return drawChat();
  drawThoughts(view, false);
  showNames();
  await Promise.race([view.shown.finish(message.content), pause(2000)]);
  around(() => drawFoot(view));
  $("spoken").textContent = progress.first ? `${nameOfModel()}: ${view.body.textContent.trim().slice(0, 1000)}` : "An empty answer.";
}

function viewOf(message) {
  const box = turnAt(chat.messages.indexOf(message)), view = { box, message, body: box.querySelector(".markdown"), foot: box.querySelector(".foot") };
  view.thoughts = box.querySelector(".thoughts");
  view.body.replaceChildren();
  view.shown = new Shown(view.body, around);
  view.shown.grow(message.content);
  return view;
}

function busy(is) {
  if (is && document.activeElement === $("send")) $("say").focus();
  if (!is && document.activeElement === $("stop")) focusBox();
  $("stop").hidden = !is;
  $("send").hidden = is;
  $("room").classList.toggle("busy", is);
  if (is) $("spoken").textContent = "Answering.";
}

// ---- What a person does with a turn.

const ACTIONS = {
  copy: (at, made) => copied(made, chat.messages[at].content),
  "copy-code": (at, made) => copied(made, made.closest(".block").querySelector("code").textContent),
  edit: (at) => edit(at),
  regenerate: (at) => redo(at),
  continue: (at) => { if (!run) answer(stateOf(chat), () => {}, () => ACTIONS.continue(at), chat.messages[at]); },
  answer: () => redo(chat.messages.length - 1),
  cancel: (at, made) => { made.closest(".turn").replaceWith(drawTurn(chat.messages[at]).box); turnAt(at).querySelector("button").focus(); },
};

async function copied(made, text) {
  await copyText(text);
  made.lastChild.data = "Copied";
  $("spoken").textContent = "Copied.";
  setTimeout(() => { made.lastChild.data = "Copy"; }, 1500);
}

function edit(at, text = chat.messages[at].content) {
  if (run || !turnAt(at)) return;
  const box = turnAt(at), form = element("form", "editor"), area = element("textarea"), buttons = element("div", "buttons");
  const cancel = button("Cancel", "cancel"), done = element("button", "main", "Send"), note = chat.messages.length > at + 1 ? "What comes after is replaced." : "";
  area.value = text;
  area.dir = "auto";
  area.setAttribute("aria-label", "Your message, edited");
  buttons.append(element("span", "note", note), grouped([cancel, done]));
  form.append(area, buttons);
  form.onsubmit = (event) => {
    event.preventDefault();
    if (area.value.trim()) redo(at, area.value.trim());
  };
  area.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel.click(); }
    else if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
  };
  area.oninput = () => grow(area);
  box.replaceChildren(form);
  grow(area);
  area.focus();
}

// ---- The list of chats.

function drawList() {
  const kept = keptChats(), list = kept || [];
  if (chat.messages.length && !list.some((each) => each.id === chat.id)) list.unshift(chat);
  patch($("list"), list.map(entry));
  $("kept").textContent = kept === null || lost === "forbidden" ? "This browser keeps nothing for this page: chats end with the tab. Export what you need."
    : lost === "full" ? "Storage is full: this chat is not kept. Export or delete some."
      : list.length ? "" : "Chats are kept here, in this browser only.";
}

function entry({ id, title }) {
  const made = element("li"), open = button(title, "open"), isOpen = id === chat.id;
  open.dir = "auto";
  made.dataset.id = id;
  made.append(open);
  if (isOpen) {
    open.setAttribute("aria-current", "true");
    const acts = element("div", "acts");
    acts.append(button("Rename", "rename"), button(".json", "json"), button(".md", "markdown"), button("Delete", "delete"));
    acts.children[1].setAttribute("aria-label", "Export as JSON");
    acts.children[2].setAttribute("aria-label", "Export as Markdown");
    made.append(acts);
  }
  return made;
}

const LIST_ACTIONS = {
  open: (id) => { if (id !== chat.id) open(keptChat(id) || newChat()); $("drawer").close(); focusBox(); },
  rename: async () => {
    const name = await ask({ title: "Rename this chat", name: chat.title, yes: "Rename" });
    if (name?.trim()) { Object.assign(chat, { title: name.trim(), isNamed: true }); save(); showNames(); }
  },
  json: () => download(chat.title + ".jsonl", asLine(chat, $("system").value.trim()), "application/jsonl"),
  markdown: () => download(chat.title + ".md", asMarkdown(chat, nameOfModel()), "text/markdown"),
  delete: async (id) => {
    if (!await ask({ title: "Delete this chat?", text: `“${chat.title}” is deleted from this browser, for good.`, yes: "Delete", isBad: true })) return;
    if (run?.chat === chat) { run.isDropped = true; stop(); run = null; busy(false); }
    forget(id);
    open(newChat());
    $("new").focus();
  },
};

// Ask for a name, or whether something shall be done; null means no.
function ask({ title, text = "", name, yes, isBad = false }) {
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-name").hidden = name === undefined;
  $("ask-name").value = name ?? "";
  $("ask-yes").textContent = yes;
  $("ask-yes").className = isBad ? "bad" : "main";
  $("ask").showModal();
  (name === undefined ? $("ask-no") : $("ask-name")).focus();
  $("ask-name").select();
  return new Promise((resolve) => {
    let result = null;
    $("asked").onsubmit = (event) => { event.preventDefault(); result = name === undefined ? "yes" : $("ask-name").value; $("ask").close(); };
    $("ask").onclose = () => resolve(result);
  });
}

function open(which) {
  stop();
  run = null;
  busy(false);
  chat = which;
  remember("sessionStorage", "open", chat.id);
  hideToast();
  $("log").replaceChildren();
  drawList();
  return drawChat();
}

function begin() {
  if (chat.messages.length || run) open(newChat());
  $("drawer").close();
  focusBox();
}

function showChats() {
  if (isWide.matches) $("new").focus();
  else if (!$("drawer").open) $("drawer").showModal();
}

function placeChats() {
  $("drawer").close();
  (isWide.matches ? $("side") : $("drawer")).append($("chats"));
}

// Another tab has kept or deleted a chat. What is being written here is left alone; `keep` sees to it that both stay.
function onStorage({ key }) {
  if (key !== null && !key.startsWith(CHAT)) return;
  const theirs = keptChat(chat.id);
  if (theirs && theirs.revision !== chat.revision && !run && !$("log").querySelector(".editor")) { chat = theirs; drawChat(); }
  drawList();
}

// ---- Settings.

function askForKey(text) {
  $("keybox").hidden = false;
  $("keynote").textContent = text + " It is kept until this tab is closed.";
  $("keynote").classList.add("bad");
  showSettings();
  $("key").focus();
}

function showSettings() { if (!$("settings").open) $("settings").showModal(); }

function firstWrong() { return ["temperature", "top_p", "most"].find((id) => !$(id).checkValidity()); }

function settle(event) {
  event.preventDefault();
  const id = firstWrong(), ranges = { temperature: "a number from 0 to 2", top_p: "a number above 0, at most 1", most: "a whole number, 1 or more" };
  $("wrong").hidden = !id;
  if (!id) return $("settings").close();
  $("wrong").textContent = `${document.querySelector(`label[for=${id}]`).textContent}: expected ${ranges[id]}, or nothing.`;
  $(id).focus();
}

function keepSettings() {
  for (const id of Object.keys(USUAL)) {
    if ($(id).checkValidity()) remember("localStorage", id, $(id).value);
    else $(id).value = recall("localStorage", id) ?? USUAL[id];
  }
  remember("localStorage", "which", $("which").value);
  $("wrong").hidden = true;
  showNames();
}

function useKey() {
  remember("sessionStorage", "key", $("key").value);
  $("keynote").textContent = "It is kept until this tab is closed.";
  $("keynote").classList.remove("bad");
  loadModels();
}

// ---- The box, and the keyboard.

function grow(area) {
  area.style.height = "auto";
  area.style.height = area.scrollHeight + 2 + "px";
}

function setBox(text) {
  $("say").value = text;
  remember("sessionStorage", "draft", text);
  grow($("say"));
}

// Whether a key sends: on a touch screen Enter is the only way to a new line.
function sends(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return false;
  return event.ctrlKey || event.metaKey || !isTouch.matches;
}

function onBoxKey(event) {
  const mine = chat.messages.findLastIndex((each) => each.role === "user");
  if (sends(event)) { event.preventDefault(); send(); }
  else if (event.key === "ArrowUp" && !$("say").value && mine >= 0 && !run) { event.preventDefault(); edit(mine); }
}

function onKey(event) {
  if (event.key === "Escape" && run && !document.querySelector("dialog[open]")) stop();
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) { event.preventDefault(); begin(); }
}

function onClick(event) {
  const made = event.target.closest("[data-do]"), id = made?.closest("li[data-id]")?.dataset.id;
  if (!made) return;
  if (id) return void LIST_ACTIONS[made.dataset.do]?.(id);
  const turns = Array.from($("log").querySelectorAll(".turn"));
  ACTIONS[made.dataset.do]?.(turns.indexOf(made.closest(".turn")), made);
}

function listen() {
  const clicks = { new: begin, another: begin, menu: showChats, shut: () => $("drawer").close(), gear: showSettings, dismiss: () => $("settings").close(),
    stop, latest: toEnd, "ask-no": () => $("ask").close(), reset: () => { for (const [id, value] of Object.entries(USUAL)) $(id).value = value; keepSettings(); } };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  for (const id of ["drawer", "settings", "ask"]) $(id).addEventListener("click", (event) => { if (event.target === $(id)) $(id).close(); });
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
  window.addEventListener("storage", onStorage);
  isWide.addEventListener("change", placeChats);
  $("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("say").addEventListener("input", () => { grow($("say")); remember("sessionStorage", "draft", $("say").value); });
  $("say").addEventListener("keydown", onBoxKey);
  $("main").addEventListener("scroll", () => { $("latest").hidden = atEnd(); });
  $("choices").addEventListener("submit", settle);
  $("settings").addEventListener("close", keepSettings);
  $("key").addEventListener("change", useKey);
}

async function start() {
  for (const [id, usual] of Object.entries(USUAL)) $(id).value = recall("localStorage", id) ?? usual;
  const key = recall("sessionStorage", "key");
  if (key) { $("key").value = key; $("keybox").hidden = false; }
  $("ideas").append(...IDEAS.map((text) => { const made = button(text, "idea"); made.onclick = () => { setBox(text); $("say").focus(); }; return made; }));
  $("hint").hidden = isTouch.matches;
  listen();
  placeChats();
  setBox(recall("sessionStorage", "draft") || "");
  chat = keptChat(recall("sessionStorage", "open")) || chat;
  showNames();
  drawList();
  await loadModels();
  if (!run) drawChat();
}

start();
