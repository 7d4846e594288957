// How a message looks: one article with its text, what there is to do with it, and for a reply its numbers.

import { announce, copyText, element, icon, iconButton } from "./dom.js";
import { describe } from "./reply.js";
import { TokenView } from "./tokens.js";

/** Whether the switch "Look inside" is on. */
export const looksInside = () => document.body.classList.contains("look-inside");

export function copyButton(text) {
  return iconButton("copy", "Copy", async () => announce((await copyText(text())) ? "Copied." : "Copying failed: select the text and copy it yourself."));
}

/** The article of a message of the person; `actions` are buttons. */
export function userMessage(text, actions = []) {
  const body = element("div", { class: "text", dir: "auto" }, text);
  return element("article", { class: "message user", "aria-label": "You" }, body, element("div", { class: "message-foot" }, element("div", { class: "actions" }, ...actions)));
}

/**
 * The article of a reply. `actions(reply)` returns its buttons once it has ended; `onReplace(reply, index, alternative)`
 * is called when a person chooses another token; `onRetry(reply)` after an error.
 */
export class ReplyView {
  constructor(reply, { actions = () => [], onReplace, onRetry }) {
    Object.assign(this, { reply, actions, onReplace, onRetry });
    this.body = element("div", { class: "text", dir: "auto" });
    this.state = element("div", { class: "state" });
    this.numbers = element("span", { class: "numbers" });
    this.buttons = element("div", { class: "actions" });
    this.better = element("p", { class: "better", dir: "auto", hidden: true });
    this.notice = element("div"); // what went wrong with the feedback
    this.node = element(
      "article",
      { class: "message assistant", "aria-label": "Reply" },
      this.body,
      this.state,
      this.better,
      this.notice,
      element("div", { class: "message-foot" }, this.numbers, this.buttons),
    );
    this.update();
  }

  /** Show the reply as it is now; while it grows only what is new is added. */
  update(reply = this.reply) {
    if (reply !== this.reply) {
      this.#clear();
      this.notice.replaceChildren();
    }
    this.reply = reply;
    if (looksInside() && reply.tokens.length > 0) this.#showTokens();
    else this.#showText();
    this.#showState();
    const correction = reply.feedback?.correction;
    this.better.hidden = !correction;
    this.better.textContent = correction ? `Your version: ${correction}` : "";
    const running = reply.finish === null;
    this.node.classList.toggle("running", running);
    this.node.setAttribute("aria-busy", running);
    this.numbers.textContent = describe(reply);
    this.buttons.replaceChildren(...(running ? [] : this.actions(reply)));
  }

  #clear() {
    this.tokens?.remove();
    this.tokens = null;
    this.body.replaceChildren();
  }

  #showText() {
    if (this.tokens) this.#clear();
    const shown = this.body.textContent;
    // Appending keeps a selection that the person has made in the text.
    if (this.body.firstChild && this.reply.text.startsWith(shown)) this.body.firstChild.appendData(this.reply.text.slice(shown.length));
    else this.body.textContent = this.reply.text;
  }

  #showTokens() {
    if (!this.tokens) {
      const onReplace = (index, alternative) => this.onReplace(this.reply, index, alternative);
      this.tokens = new TokenView(this.body, this.reply.start, onReplace);
    }
    this.tokens.update(this.reply.tokens);
  }

  #showState() {
    const { waiting, error } = this.reply;
    const text = waiting ?? (error ? `${error.message} ${error.advice}` : "");
    if (this.state.dataset.text === text) return;
    this.state.dataset.text = text;
    this.state.replaceChildren();
    if (waiting) this.state.append(element("p", { class: "waiting" }, waiting));
    if (error) this.state.append(errorBox(error, () => this.onRetry(this.reply)));
  }
}

/** An error as text: what happened, what to do, and a button that tries again. */
export function errorBox({ message, advice }, onRetry) {
  return element(
    "div",
    { class: "error", role: "alert" },
    element("p", {}, element("strong", {}, message), " ", advice),
    element("button", { type: "button", class: "secondary", onclick: onRetry }, icon("repeat"), "Try again"),
  );
}

/** Read a reply aloud once it has ended: text that arrives in pieces cannot be listened to. */
export function announceReply(reply) {
  if (reply.finish === "stopped") announce("Stopped.");
  else if (reply.finish !== "error") announce(`${reply.model}: ${reply.text}`);
}
