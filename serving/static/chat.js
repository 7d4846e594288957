// The page "Chat": one chat with its messages, and what a person can do with them.

import { Composer } from "./composer.js";
import { askToConfirm } from "./dialogs.js";
import { announce, byId, element, iconButton } from "./dom.js";
import { announceReply, copyButton, ReplyView, userMessage } from "./message.js";
import { editor } from "./editor.js";
import { correct, eventOf, feedbackButtons, sendEvent } from "./feedback.js";
import { fillPicker, findModel, noModelNotice } from "./models.js";
import { generate, newId, newReply, replaceToken } from "./reply.js";
import { askedMessages, askedNow, newChat, saveChat, shownReply, titleOf } from "./store.js";

export class ChatPage {
  /** `onChange(chat)` is called when the list of chats must be updated. */
  constructor(onChange) {
    this.onChange = onChange;
    this.running = new Map(); // chat id -> {chat, controller, done} of the reply that is being made
    this.log = byId("messages");
    this.picker = byId("chat-model");
    this.system = byId("system-message");
    this.composer = new Composer(byId("chat-composer"), { onSend: (text) => this.#send(text), onStop: () => this.stop() });
    this.picker.addEventListener("change", () => {
      this.chat.model = this.picker.value;
      if (this.chat.messages.length > 0) this.#save();
      this.#showWindow();
    });
    this.system.addEventListener("change", () => {
      this.chat.system = this.system.value;
      if (this.chat.messages.length > 0) this.#save();
    });
    this.system.addEventListener("input", () => byId("system-state").toggleAttribute("hidden", this.system.value.trim() === ""));
    this.chat = newChat();
    this.show(this.chat);
  }

  setModels(models) {
    this.models = models;
    const usable = fillPicker(this.picker, models, "chat", this.chat.model);
    this.composer.setEnabled(usable);
    byId("chat-notice").replaceChildren(...(usable ? [] : [noModelNotice(models, "chat")]));
    this.#showWindow();
  }

  get model() {
    return findModel(this.models, this.picker.value);
  }

  /** Show a chat; a reply that is being made in another one continues there. */
  show(chat) {
    this.chat = chat;
    this.system.value = chat.system;
    byId("system-state").hidden = chat.system.trim() === "";
    if (chat.model && findModel(this.models, chat.model)) this.picker.value = chat.model;
    this.#showMessages();
    this.composer.setRunning(this.running.has(chat.id));
    this.showTitle();
  }

  showTitle() {
    document.title = `${titleOf(this.chat)} – Jojo`;
  }

  focus() {
    this.composer.area.focus();
  }

  /** Stop the reply of the chat that is shown; false if none is being made. */
  stop() {
    return this.stopChat(this.chat.id);
  }

  /** The chat with this id if it is shown or a reply is being made in it: the one to change. */
  chatInMemory(id) {
    return this.chat.id === id ? this.chat : this.running.get(id)?.chat;
  }

  stopChat(id) {
    this.running.get(id)?.controller.abort();
    return this.running.has(id);
  }

  /** Draw everything again, for the switch "Look inside". */
  refresh() {
    for (const view of this.views.values()) view.update();
  }

  #showMessages() {
    this.views = new Map(); // message id -> ReplyView
    byId("welcome").hidden = this.chat.messages.length > 0;
    this.log.replaceChildren(...this.chat.messages.map((message) => this.#view(message)));
    this.#showWindow();
    this.#scrollDown(true);
  }

  #view(message) {
    if (message.role === "user") {
      const edit = iconButton("edit", "Edit and continue from here", () => this.#editUser(message));
      const node = userMessage(message.text, [copyButton(() => message.text), edit]);
      node.dataset.id = message.id;
      return node;
    }
    const view = new ReplyView(shownReply(message), {
      actions: (reply) => this.#actions(message, reply),
      onReplace: (reply, index, alternative) => this.#take(message, reply, index, alternative),
      onRetry: (reply) => this.#run(message, reply),
    });
    view.node.dataset.id = message.id;
    this.views.set(message.id, view);
    return view.node;
  }

  #actions(message, reply) {
    const buttons = [...this.#feedback(message, reply), copyButton(() => reply.text)];
    if (message.versions.length > 1) {
      const turn = (step) => () => {
        message.version = (message.version + step + message.versions.length) % message.versions.length;
        this.#save();
        this.views.get(message.id).update(shownReply(message));
      };
      const where = `${message.version + 1} of ${message.versions.length}`;
      buttons.push(
        iconButton("left", `Previous version (this is ${where})`, turn(-1)),
        element("span", { class: "numbers" }, where),
        iconButton("right", `Next version (this is ${where})`, turn(1)),
      );
    }
    buttons.push(iconButton("edit", "Edit this reply", () => this.#editReply(message, reply)));
    if (reply.finish !== "stop" && reply.text) buttons.push(iconButton("play", "Continue this reply", () => this.#run(message, reply)));
    buttons.push(iconButton("repeat", "Regenerate", () => this.#newVersion(message, newReply(this.picker.value))));
    return buttons;
  }

  /** The buttons that judge a reply. For a reply that the person wrote, there is only the button that edits it. */
  #feedback(message, reply) {
    const judged = message.versions.find((one) => one.id === reply.corrects) ?? reply;
    const onImprove = () => this.#improve(message, judged);
    return feedbackButtons(judged, { onJudge: () => this.#keep(message, judged), onImprove, only: judged !== reply });
  }

  #keep(message, reply) {
    this.#save();
    sendEvent(eventOf(reply, askedMessages(this.chat, message, reply)), this.views.get(message.id).notice);
  }

  /** Let the person write a better reply: it becomes the version that is shown, and nothing is dropped. */
  #improve(message, reply) {
    const view = this.views.get(message.id);
    const use = (text) => {
      const isSame = correct(reply, text);
      const own = { ...newReply(reply.model, { start: text }), finish: "stop", corrects: reply.id };
      if (!isSame) message.versions.push(own);
      message.version = isSame ? message.versions.indexOf(reply) : message.versions.length - 1;
      view.update(shownReply(message));
      view.node.querySelector(".word-button").focus();
      announce(isSame ? "The reply is the model's own again." : "The reply is now what you wrote.");
      this.#keep(message, reply);
    };
    editor(view.node, reply.feedback?.correction ?? reply.text, "Say it better", [["Use this", use]]);
  }

  #send(text) {
    this.chat.model = this.picker.value;
    this.chat.system = this.system.value;
    const question = { id: newId(), role: "user", text };
    this.#add(question);
    this.#answer();
  }

  #add(message) {
    this.chat.messages.push(message);
    byId("welcome").hidden = true;
    this.log.append(this.#view(message));
  }

  /** Add a reply to the messages so far. */
  #answer() {
    const reply = newReply(this.picker.value);
    const message = { id: newId(), role: "assistant", versions: [reply], version: 0 };
    this.#add(message);
    this.#scrollDown(true);
    return this.#run(message, reply);
  }

  /** Another version of a reply; what came after the old one belongs to the old one and is dropped. */
  async #newVersion(message, reply) {
    if (!(await this.#dropAfter(message))) return;
    message.versions.push(reply);
    message.version = message.versions.length - 1;
    this.views.get(message.id).update(reply);
    return this.#run(message, reply);
  }

  #take(message, reply, index, alternative) {
    return this.#newVersion(message, replaceToken(reply, index, alternative));
  }

  /** Drop the messages after this one. If the person wrote one of them, ask first, and return false on a no. */
  async #dropAfter(message) {
    const { messages } = this.chat;
    const after = messages.slice(messages.indexOf(message) + 1);
    const question = `The ${after.length} messages after this one will be removed from the chat.`;
    const needsConsent = after.some((one) => one.role === "user");
    if (needsConsent && !(await askToConfirm("Continue from here?", question, "Continue"))) return false;
    this.stop();
    for (const dropped of messages.splice(messages.indexOf(message) + 1)) {
      this.log.querySelector(`[data-id="${dropped.id}"]`)?.remove();
      this.views.delete(dropped.id);
    }
    return true;
  }

  #editUser(message) {
    const node = this.log.querySelector(`[data-id="${message.id}"]`);
    const send = async (text) => {
      if (!(await this.#dropAfter(message))) return;
      message.text = text;
      node.replaceWith(this.#view(message));
      this.#answer();
      this.focus();
    };
    editor(node, message.text, "Edit your message", [["Send", send]]);
  }

  #editReply(message, reply) {
    const edited = (text) => newReply(reply.model, { start: text });
    const save = async (text) => {
      if (!(await this.#dropAfter(message))) return;
      message.versions.push({ ...edited(text), finish: "stop" });
      message.version = message.versions.length - 1;
      this.views.get(message.id).update(shownReply(message));
      this.#save();
      this.#showWindow();
    };
    const saveAndContinue = (text) => this.#newVersion(message, edited(text));
    editor(this.views.get(message.id).node, reply.text, "Edit this reply", [["Save and continue", saveAndContinue], ["Save", save]]);
  }

  /** Make a reply, or the rest of one. A reply that is being made in the same chat is stopped first. */
  async #run(message, reply) {
    const { chat, model } = this;
    if (!model) {
      Object.assign(reply, { finish: "error", error: { message: "There is no model.", advice: "Start the server with a chat model and reload the page." } });
      this.views.get(message.id).update(reply);
      return;
    }
    const previous = this.running.get(chat.id);
    previous?.controller.abort();
    const controller = new AbortController();
    const onUpdate = () => {
      if (this.chat !== chat || shownReply(message) !== reply) return;
      this.views.get(message.id)?.update(reply);
      this.#scrollDown(false);
    };
    reply.model = model.id;
    chat.updated = Date.now();
    this.#save();
    announce("The model is writing.");
    reply.asked = askedNow(chat, message);
    const messages = askedMessages(chat, message, reply);
    const done = Promise.resolve(previous?.done).then(() => generate(reply, model, { messages }, controller.signal, onUpdate));
    this.running.set(chat.id, { chat, controller, done });
    this.composer.setRunning(true);
    await done;
    const isLast = this.running.get(chat.id).controller === controller;
    if (isLast) this.running.delete(chat.id);
    this.#save(chat);
    if (this.chat !== chat || !isLast) return;
    this.composer.setRunning(false);
    this.#showWindow();
    announceReply(reply);
  }

  #save(chat = this.chat) {
    if (chat.deleted) return; // its reply was stopped because it was deleted
    const kept = saveChat(chat);
    const message = "The browser has no room for more chats. Export and delete some; this one is lost when you close the page.";
    byId("chat-notice").replaceChildren(...(kept ? [] : [element("p", { class: "error", role: "alert" }, message)]));
    this.onChange(chat);
    this.showTitle();
  }

  /** How full the window of the model was at the last reply. */
  #showWindow() {
    const last = this.chat.messages.at(-1);
    const usage = last?.role === "assistant" ? shownReply(last).usage : null;
    const size = this.model?.block_size;
    byId("window").hidden = !usage || !size;
    if (!usage || !size) return;
    const text = `${usage.total_tokens.toLocaleString("en")} of ${size.toLocaleString("en")} tokens`;
    const share = Math.min(1, usage.total_tokens / size);
    const meter = byId("window-meter");
    byId("window-text").textContent = text;
    meter.title = text;
    meter.setAttribute("aria-valuenow", usage.total_tokens);
    meter.setAttribute("aria-valuemax", size);
    meter.setAttribute("aria-valuetext", text);
    meter.classList.toggle("nearly-full", share > 0.95);
    meter.firstChild.style.width = `${100 * share}%`;
  }

  /** Keep the end in view, unless the person has scrolled up to read. */
  #scrollDown(always) {
    const area = byId("chat-scroll");
    const nearEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 120;
    if (always || nearEnd) area.scrollTop = area.scrollHeight;
  }
}
