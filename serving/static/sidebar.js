// The list of chats: open, search, rename, delete, export and import.

import { askForText, askToConfirm } from "./dialogs.js";
import { announce, byId, download, element, iconButton } from "./dom.js";
import { allChats, deleteChat, exportChats, importChats, loadChat, newChat, saveChat, searchChats, titleOf } from "./store.js";

const MAX_IMPORT_BYTES = 20 * 2 ** 20; // far more than localStorage holds

export class Sidebar {
  constructor(page) {
    this.page = page;
    this.list = byId("chat-list");
    this.search = byId("search");
    this.search.addEventListener("input", () => {
      const n = this.show();
      announce(n === 1 ? "1 chat found." : `${n} chats found.`);
    });
    byId("new-chat").addEventListener("click", () => this.#open(newChat()));
    byId("export-chats").addEventListener("click", () => this.#export());
    byId("import-chats").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.#import(event.target));
    byId("open-sidebar").addEventListener("click", () => this.#slide(true));
    byId("close-sidebar").addEventListener("click", () => this.#slide(false));
    byId("sidebar-shade").addEventListener("click", () => this.#slide(false));
    byId("sidebar").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.isOpen) return;
      event.stopPropagation();
      this.#slide(false);
    });
    window.addEventListener("storage", () => this.show()); // another tab of the same browser
    this.show();
  }

  /** Whether the list covers a narrow window; in a wide one it is always visible. */
  get isOpen() {
    return document.body.classList.contains("sidebar-open");
  }

  #slide(open) {
    if (open === this.isOpen) return;
    document.body.classList.toggle("sidebar-open", open);
    byId("open-sidebar").setAttribute("aria-expanded", open);
    byId("main").inert = open;
    byId(open ? "new-chat" : "open-sidebar").focus();
  }

  /** Show the chats that match the search; returns how many. */
  show() {
    const chats = this.search.value.trim() ? searchChats(this.search.value) : allChats();
    const focused = document.activeElement?.closest?.("#chat-list li")?.dataset.id;
    const items = chats.map((chat) => this.#item(chat));
    this.list.replaceChildren(...items);
    const text = this.search.value.trim() ? "No chat contains this." : "Your chats stay in this browser.";
    byId("no-chats").textContent = text;
    byId("no-chats").hidden = chats.length > 0;
    byId("export-chats").disabled = chats.length === 0;
    if (focused) items.find((item) => item.dataset.id === focused)?.querySelector("button").focus();
    return chats.length;
  }

  #item(chat) {
    const title = titleOf(chat);
    const current = chat.id === this.page.chat.id;
    return element(
      "li",
      { "data-id": chat.id },
      element("button", { type: "button", class: "open-chat", "aria-current": current && "true", onclick: () => this.#open(loadChat(chat.id)) }, title),
      iconButton("edit", `Rename “${title}”`, () => this.#rename(chat.id, title)),
      iconButton("remove", `Delete “${title}”`, () => this.#delete(chat.id, title)),
    );
  }

  #open(chat) {
    if (!chat) return; // deleted in another tab
    // A reply that is being made belongs to the chat in memory, not to a copy of it.
    if (chat.id !== this.page.chat.id) this.page.show(this.page.chatInMemory(chat.id) ?? chat);
    this.show();
    this.#slide(false);
    location.hash = "chat";
    this.page.focus();
  }

  async #rename(id, title) {
    const name = await askForText("Rename chat", "Name", "Rename", { value: title });
    if (!name) return;
    const chat = this.page.chatInMemory(id) ?? loadChat(id);
    chat.title = name;
    saveChat(chat);
    if (chat === this.page.chat) this.page.showTitle();
    this.show();
  }

  async #delete(id, title) {
    if (!(await askToConfirm("Delete chat?", `“${title}” will be deleted from this browser. This cannot be undone.`, "Delete"))) return;
    const chat = this.page.chatInMemory(id);
    if (chat) chat.deleted = true;
    this.page.stopChat(id);
    deleteChat(id);
    if (this.page.chat.id === id) this.page.show(newChat());
    this.show();
    byId("new-chat").focus();
    announce("Deleted.");
  }

  #export() {
    download("jojo-chats.jsonl", exportChats(allChats()));
    announce("All chats were exported to jojo-chats.jsonl.");
  }

  async #import(input) {
    const [file] = input.files;
    if (!file) return;
    const result = byId("import-result");
    const say = (text) => {
      result.textContent = text;
      announce(text);
    };
    if (file.size > MAX_IMPORT_BYTES) say("This file is larger than a browser can store. Split it and import a part.");
    else {
      const { read, skipped, noRoom } = importChats(await file.text());
      const parts = [`${read} ${read === 1 ? "chat" : "chats"} imported.`];
      if (skipped > 0) parts.push(`${skipped} ${skipped === 1 ? "line" : "lines"} skipped: not a conversation between user and assistant.`);
      if (noRoom > 0) parts.push(`The browser had no room for ${noRoom}.`);
      say(parts.join(" "));
    }
    input.value = ""; // so that the same file can be chosen again
    this.show();
  }
}
