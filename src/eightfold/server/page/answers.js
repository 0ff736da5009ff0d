// ---- Changes of a chat. What the server refuses is taken back.

const stateOf = (which) => structuredClone({ messages: which.messages, from: which.from, used: which.used, title: which.title });

function restore(which, state) {
  if (run?.chat === which) abandon();
  Object.assign(which, structuredClone(state));
  save(which);
  return which === chat ? drawChat() : null;
}

function save(which = chat) {
  const id = which.id, was = lost;
  lost = keep(which);
  if (lost) loose.set(which.id, which);
  else loose.delete(which.id);
  if (which.id !== id) toast("Another tab has changed this chat meanwhile, so both are kept.");
  if (which === chat) remember("sessionStorage", "open", chat.id);
  if (lost === "full" && was !== "full") notice("The browser’s storage is full: this chat is not kept. Export or delete some.", [["Chats", showChats]]);
  drawList();
}

function send() {
  const text = $("say").value.trim();
  if (!text || run) return;
  const before = stateOf(chat);
  if (!chat.messages.length && !chat.isNamed) chat.title = titleFrom(text);
  chat.messages.push({ role: "user", content: text });
  addTurn(chat.messages.at(-1));
  setBox("");
  hideNotices();
  answer(before, send, () => setBox([text, $("say").value].filter(Boolean).join("\n")));
}

// Go on from a message of mine, perhaps with another text, or give another answer.
function redo(at, text) {
  if (run) return;
  const before = stateOf(chat), was = chat, end = chat.messages[at].role === "user" ? at + 1 : at;
  const replaces = text !== undefined || chat.messages.slice(end).some((each) => each.content);
  turns().slice(end).forEach((each) => each.remove());
  chat.messages = chat.messages.slice(0, end);
  chat.from = Math.min(chat.from, Math.max(end - 1, 0));
  if (text !== undefined) {
    chat.messages[at] = { role: "user", content: text };
    turns()[at].replaceWith(drawTurn(chat.messages[at]).box);
    if (at === 0 && !chat.isNamed) chat.title = titleFrom(text);
  }
  hideNotices();
  if (replaces) toast("What stood here is replaced.", [["Undo", () => restore(was, before)]]);
  answer(before, () => redo(at, text), async (drawn) => {
    $("toast").hidden = true;
    await drawn;
    if (text !== undefined && was === chat) edit(at, text);
  });
}

// Go on with an answer that is not complete.
function proceed(at) {
  if (!run) answer(stateOf(chat), () => proceed(at), () => {}, chat.messages[at]);
}

// ---- An answer.

// What a stream has brought to a message, which may begin with what came before.
class Progress {
  constructor(message) {
    this.message = message;
    this.prefix = message.content;
    this.text = "";
    this.begin = performance.now();
    this.first = this.last = this.thoughtFrom = this.tokens = 0;
    this.ends = undefined;
  }

  // Take an event; return whether it brought text.
  take(event) {
    const { message } = this, choice = event.choices?.[0], { content, reasoning_content: reasoning } = choice?.delta || {};
    if (event.usage) Object.assign(this, { tokens: event.usage.completion_tokens, used: event.usage.prompt_tokens + event.usage.completion_tokens });
    this.ends = choice?.finish_reason || this.ends;
    if (!content && !reasoning) return false;
    this.tokens += 1;  // about; the usage at the end says how many they are
    this.last = performance.now();
    this.first ||= this.last;
    this.text += content || "";
    const split = this.prefix ? null : withoutThoughts(this.text);
    if (reasoning) message.reasoning = (message.reasoning || "") + reasoning;
    else if (split?.reasoning) message.reasoning = split.reasoning;
    message.content = this.prefix + (split ? split.content : this.text);
    this.isThinking = Boolean(message.reasoning) && !message.content;
    if (this.isThinking) this.thoughtFrom ||= this.last;
    else this.noteThought();
    return true;
  }

  // Note how long the thoughts took that have ended.
  noteThought() {
    if (this.thoughtFrom) this.message.thought ??= Math.max(1, Math.round((this.last - this.thoughtFrom) / 1000));
  }

  facts() {
    const rate = this.tokens > 1 && this.last > this.first ? (this.tokens - 1) / (this.last - this.first) * 1000 : 0;
    const first = "first after " + ((this.first - this.begin) / 1000).toFixed(2) + " s";
    return [format(this.tokens) + (this.tokens === 1 ? " token" : " tokens"), rate ? rate.toFixed(1) + " tok/s" : "", first].filter(Boolean).join(", ");
  }
}

// Split thoughts off that the server has left in a text: <think> ... </think> at its beginning.
function withoutThoughts(text) {
  const trimmed = text.trimStart();
  if (trimmed.length < 7 && "<think>".startsWith(trimmed)) return { reasoning: "", content: "" };
  if (!trimmed.startsWith("<think>")) return null;
  const [reasoning, ...rest] = trimmed.slice(7).split("</think>");
  return { reasoning, content: rest.join("</think>").trimStart() };
}

// Have the chat's last turn answered, or an answer continued. If the server refuses, all is as before, and putBack is called.
async function answer(before, again, putBack, continues = null) {
  const message = continues || { role: "assistant", content: "" }, progress = new Progress(message);
  const mine = run = { chat, message, progress, controller: new AbortController(), view: null };
  save();  // what another tab shows meanwhile
  if (!continues) chat.messages.push(message);
  mine.view = continues ? views.get(message) : addTurn(message);
  drawFoot(mine.view);
  busy(true);
  markLast();
  toEnd();
  const problem = await ask(mine, Boolean(continues));
  if (mine.isDropped) return;
  if (run === mine) release();
  if (problem && !progress.first && mine.chat === chat && !mine.controller.signal.aborted) {
    putBack(restore(chat, before));
    return complain(problem, again);
  }
  settle(mine, problem);
  if (mine.chat === chat) await finish(mine);
}

// Return the problem that ended an answer, or null.
async function ask(mine, continues) {
  const { signal } = mine.controller;
  try {
    if (!models.length) await readModels();
    await fit(mine.chat, signal);
    if (mine.chat === chat) { markForgotten(); showNames(); }
    await follow(await call("v1/chat/completions", question(mine.chat, continues), signal), mine);
    return null;
  } catch (error) {
    if (error instanceof Problem || signal.aborted) return error;
    console.error(error);
    return new Problem(`Something is wrong with this page: ${error.message}`);
  }
}

// Show what a stream brings, and keep it now and then.
async function follow(response, mine) {
  const { message, progress } = mine;
  let keptAt = performance.now(), frame = 0;
  const draw = () => {
    frame = 0;
    if (mine.chat !== chat || mine.isDropped) return;
    around(() => drawThoughts(mine.view, progress.isThinking));
    mine.view.shown.grow(message.content);
  };
  try {
    for await (const event of events(response)) {
      if (!event) mine.view.foot.querySelector(".facts").textContent = "waiting for a turn";
      if (!event || !progress.take(event)) continue;
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - keptAt < 1000 || mine.isDropped) continue;
      keptAt = performance.now();
      Object.assign(message, { ends: "broken", problem: "This answer was not complete when it was last kept." });
      keep(mine.chat);
    }
  } finally {
    cancelAnimationFrame(frame);
    draw();
  }
}

// Note in a message how it ended.
function settle({ chat: which, message, progress, controller }, problem) {
  const isStopped = problem && controller.signal.aborted;
  message.ends = isStopped ? "stopped" : problem ? "broken" : progress.ends === "length" ? "length" : undefined;
  message.problem = message.ends === "broken" ? problem.message : undefined;
  if (progress.first) message.facts = progress.facts();
  progress.noteThought();
  if (!message.content && !message.reasoning && problem) which.messages = which.messages.filter((each) => each !== message);
  which.used = progress.used || which.used;
  save(which);
}

async function finish({ view, message, progress }) {
  if (!chat.messages.includes(message)) return drawChat();
  drawThoughts(view, false);
  showNames();
  await Promise.race([view.shown.finish(message.content), pause(2000)]);
  around(() => drawFoot(view));
  $("spoken").textContent = progress.first ? `${nameOfModel()}: ${view.body.textContent.trim().slice(0, 1000)}` : "No answer.";
}

function stop() { run?.controller.abort(); }

// Let another answer begin. One that is still coming goes on to its end, which is near where it was stopped.
function release() {
  run = null;
  busy(false);
}

// Stop an answer that nobody wants any more, and keep nothing of it.
function abandon() {
  run.isDropped = true;
  stop();
  release();
}

function busy(is) {
  if (is && document.activeElement === $("send")) focusBox();
  if (!is && document.activeElement === $("stop")) focusBox();
  $("stop").hidden = !is;
  $("send").hidden = is;
  $("room").classList.toggle("busy", is);
  if (is) $("spoken").textContent = "Answering.";
}
