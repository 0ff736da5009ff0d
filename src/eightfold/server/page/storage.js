// ---- What the browser keeps. Every chat is an entry of its own, so that tabs with different chats do not meet.

const CHAT = "eightfold.chat.";
let lost = null;  // why chats are not kept: "full" or "forbidden"
const loose = new Map();  // chats that this tab could not keep
const MOST_KEPT = 4_000_000;  // characters of all chats; browsers refuse more than about five million

// Storage may be forbidden; then nothing is remembered.
function recall(store, name) { try { return window[store].getItem("eightfold." + name); } catch { return null; } }
function remember(store, name, value) { try { window[store].setItem("eightfold." + name, value); } catch { /* forbidden */ } }

function newId() { return Date.now().toString(36) + Math.random().toString(36).slice(2, 10); }

// A chat: its messages as the API wants them and what is known of them, and which of them are still sent.
function newChat() { return { id: newId(), title: "New chat", isNamed: false, revision: null, updated: 0, from: 0, used: null, messages: [] }; }

function read(text) {
  try {
    const given = JSON.parse(text), chat = { ...newChat(), ...given };
    const isRight = given.messages.length && chat.messages.every((each) => typeof each.content === "string" && each.role);
    return isRight && typeof chat.title === "string" ? chat : null;
  } catch { return null; }
}

function keptChat(id) { try { return read(localStorage.getItem(CHAT + id)); } catch { return null; } }

// The chats that are kept, the youngest first; null where nothing can be kept.
function keptChats() {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
    return names.map((name) => read(localStorage.getItem(name))).filter(Boolean).sort((a, b) => b.updated - a.updated);
  } catch { return null; }
}

function sizeOfOthers(name) {
  return Object.keys(localStorage).reduce((sum, each) => each === name ? sum : sum + localStorage.getItem(each).length, 0);
}

// Keep a chat. Another tab may have changed it meanwhile: then both are kept. Return why it is not kept, or null.
function keep(chat) {
  try {
    const theirs = localStorage.getItem(CHAT + chat.id), isOurs = theirs === null || read(theirs)?.revision === chat.revision;
    if (!chat.messages.length) {
      if (isOurs) localStorage.removeItem(CHAT + chat.id);
      return null;
    }
    const kept = { ...chat, id: isOurs ? chat.id : newId(), revision: newId(), updated: Date.now() };
    if (!isOurs) kept.title += " (copy)";
    const text = JSON.stringify(kept);
    if (sizeOfOthers(CHAT + kept.id) + text.length > MOST_KEPT) return "full";
    localStorage.setItem(CHAT + kept.id, text);
    Object.assign(chat, kept);
    return null;
  } catch (error) { return error.name === "QuotaExceededError" ? "full" : "forbidden"; }
}

function forget(id) { try { localStorage.removeItem(CHAT + id); } catch { /* forbidden */ } }

function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " "), letters = Array.from(line);
  return letters.length > 48 ? letters.slice(0, 47).join("").trimEnd() + "…" : line;
}

// ---- Chats as files.

function asMarkdown(chat, name) {
  const turns = chat.messages.map((each) => `## ${each.role === "user" ? "You" : name}\n\n${each.content.trim()}\n`);
  return [`# ${chat.title}\n`, ...turns].join("\n");
}

function download(name, text, kind) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name.replace(/[\\/:*?"<>|\u0000-\u001f]+/g, " ").trim() || "chat";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
