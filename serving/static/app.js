// The start of the page: loads the models, shows one of the three pages, and handles what concerns all of them.

import { listModels, onKeyNeeded } from "./api.js";
import { ChatPage } from "./chat.js";
import { ComparePage } from "./compare.js";
import { CompletePage } from "./complete.js";
import { askForText } from "./dialogs.js";
import { addIcons, announce, byId } from "./dom.js";
import { exportFeedback, setKept } from "./feedback.js";
import { errorBox, looksInside } from "./message.js";
import { findModel } from "./models.js";
import { setUpSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";

const THEMES = ["auto", "light", "dark"];
const THEME_NAMES = { auto: "system", light: "light", dark: "dark" };

addIcons();
let models = [];
let sidebar = null;
const chatPage = new ChatPage(() => sidebar?.show());
sidebar = new Sidebar(chatPage);
const pages = { chat: chatPage, compare: new ComparePage(), complete: new CompletePage() };

// ---- pages: the part of the address after # ----------------------------------------------------------------------

const currentName = () => (location.hash.slice(1) in pages ? location.hash.slice(1) : "chat");

function showPage() {
  const current = currentName();
  for (const name of Object.keys(pages)) {
    byId(name).hidden = name !== current;
    const link = document.querySelector(`a[href="#${name}"]`);
    if (name === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  pages[current].focus();
}

window.addEventListener("hashchange", showPage);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  pages[currentName()].focus();
});

// ---- Esc stops. Dialogs, lists and editors that Esc closes keep the key to themselves. ---------------------------

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (pages[currentName()].stop()) event.preventDefault();
});

// ---- look inside, theme, key, settings ---------------------------------------------------------------------------

function lookInside(on) {
  document.body.classList.toggle("look-inside", on);
  byId("look-inside").setAttribute("aria-pressed", on);
  localStorage.setItem("jojo.look-inside", on);
  for (const page of Object.values(pages)) page.refresh();
}
byId("look-inside").addEventListener("click", () => {
  lookInside(!looksInside());
  announce(looksInside() ? "Every token is coloured by its probability." : "Replies are shown as text.");
});
lookInside(localStorage.getItem("jojo.look-inside") === "true");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("jojo.theme", theme);
  byId("theme-name").textContent = `Theme: ${THEME_NAMES[theme]}`;
}
byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
setTheme(THEMES.includes(document.documentElement.dataset.theme) ? document.documentElement.dataset.theme : "auto");

byId("export-feedback").addEventListener("click", () => {
  const n = exportFeedback(pages.compare.events.values());
  const text = n === 0 ? "No reply has been rated yet." : `Feedback on ${n} ${n === 1 ? "reply" : "replies"} was exported to jojo-feedback.jsonl.`;
  byId("import-result").textContent = text;
  announce(text);
});

onKeyNeeded((wasWrong) => {
  const help = wasWrong ? "The server does not accept the last key." : "Whoever started the server has it. It is kept until you close this tab.";
  return askForText("This server needs a key", "API key", "Use this key", { type: "password", help });
});

setUpSettings(() => {
  const picker = { chat: "chat-model", compare: "compare-left", complete: "complete-model" }[currentName()];
  return findModel(models, byId(picker).value);
});

// ---- models ------------------------------------------------------------------------------------------------------

async function loadModels() {
  const notice = byId("server-notice");
  notice.replaceChildren();
  try {
    const found = await listModels();
    models = found.models;
    setKept(found.keepsFeedback);
  } catch (error) {
    notice.replaceChildren(errorBox(error, loadModels));
    return;
  }
  for (const page of Object.values(pages)) page.setModels(models);
}

showPage();
await loadModels();
// With only text models, start on the page that can use them.
if (location.hash === "" && models.length > 0 && models.every((model) => model.format === "text")) location.hash = "complete";
