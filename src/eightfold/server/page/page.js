// ---- The model.

async function readModels() {
  models = (await (await call("v1/models")).json()).data;
  const usual = recall("localStorage", "which"), chats = Boolean(chosenModel().has_chat_template);
  $("which").replaceChildren(...models.map((each) => new Option(each.id, each.id)));
  if (models.some((each) => each.id === usual)) $("which").value = usual;
  $("modelbox").hidden = models.length < 2;
  $("say").disabled = $("send").disabled = !chats;
  if (chats) hideNotices();
  else notice("This model has no chat template: it continues texts through the API, but cannot chat. Start the server with --chat-template FILE.", [["Look again", loadModels]]);
}

async function loadModels() {
  try {
    await readModels();
  } catch (error) {
    complain(error, loadModels);
  }
  if (!run) drawChat();
}

// ---- The list of chats.

function drawList() {
  const kept = keptChats(), list = [...loose.values(), ...(kept || []).filter((each) => !loose.has(each.id))];
  patch($("list"), list.map(entry));
  $("kept").textContent = kept === null ? "This browser keeps nothing for this page: chats end with the tab. Export what you need."
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
  open: (id) => { if (id !== chat.id) open(loose.get(id) || keptChat(id) || newChat()); $("drawer").close(); focusBox(); },
  rename: async () => {
    const name = await inquire({ title: "Rename this chat", name: chat.title, yes: "Rename" });
    if (name?.trim()) { Object.assign(chat, { title: name.trim(), isNamed: true }); save(); showNames(); }
  },
  json: () => download(chat.title + ".jsonl", JSON.stringify({ messages: sent(chat, 0) }) + "\n", "application/jsonl"),
  markdown: () => download(chat.title + ".md", asMarkdown(chat, nameOfModel()), "text/markdown"),
  delete: async (id) => {
    if (!await inquire({ title: "Delete this chat?", text: `“${chat.title}” is deleted from this browser, for good.`, yes: "Delete", isBad: true })) return;
    if (run) abandon();
    forget(id);
    loose.delete(id);
    open(newChat());
    $("new").focus();
  },
};

// Ask for a name, or whether something shall be done; null means no.
function inquire({ title, text = "", name, yes, isBad = false }) {
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
  release();
  chat = which;
  remember("sessionStorage", "open", chat.id);
  hideNotices();
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

const USUAL = { system: "", temperature: "0.7", top_p: "", most: "" };

function askForKey(text) {
  $("keybox").hidden = false;
  $("keynote").textContent = text + " It is kept until this tab is closed.";
  $("keynote").classList.add("bad");
  showSettings();
  $("key").focus();
}

function showSettings() { if (!$("settings").open) $("settings").showModal(); }

function closeSettings(event) {
  event.preventDefault();
  const id = Object.keys(USUAL).find((each) => !$(each).checkValidity()), ranges = { temperature: "a number from 0 to 2", top_p: "a number above 0, at most 1", most: "a whole number, 1 or more" };
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

const IDEAS = ["Explain int8 quantization in three sentences", "Compare tea and coffee in a table", "Write a haiku about the number eight"];

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
  ACTIONS[made.dataset.do]?.(turns().indexOf(made.closest(".turn")), made);
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
  $("choices").addEventListener("submit", closeSettings);
  $("settings").addEventListener("close", keepSettings);
  $("key").addEventListener("change", useKey);
}

function start() {
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
  loadModels();
}

start();
