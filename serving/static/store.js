// The chats of this browser, each under a key of its own in localStorage, and their import and export.
//
// chat: {id, title, updated, system, model, messages}
// message: {id, role: "user", text} or {id, role: "assistant", versions: [reply], version: index of the one shown}
// A reply also has `asked` {system, versions}, what the messages before it were, and, if the person wrote it to say
// another version better, `corrects`, the id of that version.
//
// The tokens of a chat's replies are by far its largest part and the only one that can be done without. They are
// kept under a second key, and dropped, oldest chat first, when the browser's few megabytes are full.

import { newId, newReply, shownText, showTokens } from "./reply.js";

const CHAT = "jojo.chat.";
const TOKENS = "jojo.tokens.";
const MAX_TITLE = 60;
export const UNTITLED = "New chat";

export function newChat() {
  return { id: newId(), title: "", updated: Date.now(), system: "", model: null, messages: [] };
}

export const shownReply = (message) => message.versions[message.version];
export const textOf = (message) => (message.role === "user" ? message.text : shownReply(message).text);

/** The name of a chat: what the person called it, or else the start of its first message. */
export function titleOf(chat) {
  if (chat.title) return chat.title;
  const first = chat.messages.find((message) => message.role === "user");
  const line = first ? first.text.trim().replace(/\s+/g, " ") : "";
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line || UNTITLED;
}

function* keysOf(prefix) {
  for (let i = 0; i < localStorage.length; i += 1) if (localStorage.key(i).startsWith(prefix)) yield localStorage.key(i);
}

/** All chats without their tokens, the latest first. */
export function allChats() {
  const chats = [];
  for (const key of keysOf(CHAT)) {
    try {
      const chat = JSON.parse(localStorage.getItem(key));
      if (Array.isArray(chat?.messages)) chats.push(chat);
    } catch {
      // Not written by this page; leave it alone.
    }
  }
  return chats.sort((one, other) => other.updated - one.updated);
}

/** The chats whose title or messages contain `words`. */
export function searchChats(words) {
  const wanted = words.trim().toLowerCase();
  return allChats().filter((chat) => [titleOf(chat), chat.system, ...chat.messages.map(textOf)].some((text) => text.toLowerCase().includes(wanted)));
}

/** The text of a reply before that of its tokens. */
function textBefore({ text, tokens }) {
  const shown = shownText(tokens);
  return text.endsWith(shown) ? text.slice(0, text.length - shown.length) : "";
}

/** A chat with its tokens, or null. */
export function loadChat(id) {
  const text = localStorage.getItem(CHAT + id);
  if (text === null) return null;
  const chat = JSON.parse(text);
  const packed = JSON.parse(localStorage.getItem(TOKENS + id) ?? "{}");
  for (const message of chat.messages) {
    for (const reply of message.versions ?? []) {
      reply.tokens = showTokens((packed[reply.id] ?? []).map(unpack));
      // Not kept by older versions of the page, and longer now if the tokens have been dropped.
      if (reply.start === undefined || reply.tokens.length === 0) reply.start = textBefore(reply);
    }
  }
  return chat;
}

const round = (number) => (number === null ? null : Math.round(number * 1000) / 1000);
const pack = ({ id, text, logprob, bytes, top }) => [id, text, round(logprob), bytes ?? 0, top ? top.map(pack) : 0];
const unpack = ([id, text, logprob, bytes, top]) => ({ id, text, logprob, ...(bytes && { bytes }), ...(top && { top: top.map(unpack) }) });

/** Write under a key. If the browser's storage is full, drop tokens to make room; false if that is not enough. */
function write(key, text) {
  for (;;) {
    try {
      localStorage.setItem(key, text);
      return true;
    } catch {
      const ages = new Map(allChats().map((chat) => [TOKENS + chat.id, chat.updated]));
      const [oldest] = [...keysOf(TOKENS)].filter((one) => one !== key).sort((one, other) => (ages.get(one) ?? 0) - (ages.get(other) ?? 0));
      if (!oldest) return false;
      localStorage.removeItem(oldest);
    }
  }
}

/** A field of a chat, for JSON. Without tokens, the start of a reply is its whole text, which need not be kept twice. */
function kept(name, value) {
  return name === "tokens" || (name === "start" && this.tokens.length === 0) ? undefined : value;
}

/** Keep a chat; false if the browser has no room for it. */
export function saveChat(chat) {
  if (!write(CHAT + chat.id, JSON.stringify(chat, kept))) return false;
  const packed = {};
  for (const message of chat.messages) {
    for (const reply of message.versions ?? []) if (reply.tokens.length > 0) packed[reply.id] = reply.tokens.map(pack);
  }
  if (Object.keys(packed).length > 0) write(TOKENS + chat.id, JSON.stringify(packed));
  else localStorage.removeItem(TOKENS + chat.id);
  return true;
}

export function deleteChat(id) {
  localStorage.removeItem(CHAT + id);
  localStorage.removeItem(TOKENS + id);
}

/** Messages as the API takes them, after a system message if there is one. */
function apiMessages({ system, messages }) {
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return first.concat(messages.map((message) => ({ role: message.role, content: textOf(message) })));
}

/** The system message and the versions that are shown now, to which the reply of `message` is made. */
export function askedNow(chat, message) {
  const before = chat.messages.slice(0, chat.messages.indexOf(message));
  return { system: chat.system, versions: before.map((one) => one.version ?? null) };
}

/** The messages that a version of `message` answers, as they were when it was made. */
export function askedMessages(chat, message, { asked }) {
  const { system, versions } = asked ?? askedNow(chat, message);
  const messages = versions.map((version, i) => (version === null ? chat.messages[i] : { ...chat.messages[i], version }));
  return apiMessages({ system, messages });
}

/** Chats as JSONL, one per line, in the layout that data/prepare-chat.py --input reads; it ignores the title. */
export function exportChats(chats) {
  return chats
    .filter((chat) => chat.messages.length > 0)
    .map((chat) => `${JSON.stringify({ messages: apiMessages(chat), title: titleOf(chat) })}\n`)
    .join("");
}

function chatOf({ messages, title }) {
  const chat = newChat();
  if (typeof title === "string") chat.title = title.slice(0, MAX_TITLE);
  for (const [i, { role, content }] of messages.entries()) {
    if (typeof content !== "string") throw new TypeError("a content that is not text");
    if (role === "system" && i === 0) chat.system = content;
    else if (role === "user") chat.messages.push({ id: newId(), role, text: content });
    else if (role === "assistant") chat.messages.push({ id: newId(), role, version: 0, versions: [importedReply(content)] });
    else throw new TypeError("an unknown role");
  }
  if (chat.messages.length === 0) throw new TypeError("no messages");
  return chat;
}

const importedReply = (text) => ({ ...newReply("imported", { start: text }), finish: "stop" });

/** Keep the conversations of a JSONL file. Returns how many were read, skipped, or did not fit into the browser. */
export function importChats(text) {
  const counts = { read: 0, skipped: 0, noRoom: 0 };
  const now = Date.now();
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  for (const [i, line] of lines.entries()) {
    let chat;
    try {
      chat = chatOf(JSON.parse(line));
    } catch {
      counts.skipped += 1;
      continue;
    }
    chat.updated = now - i; // the file's order, its first line on top
    if (saveChat(chat)) counts.read += 1;
    else counts.noRoom += 1;
  }
  return counts;
}
