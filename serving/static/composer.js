// The box in which a person writes: Enter sends, Shift+Enter starts a new line. While a reply is made, the button stops it.

import { growWithText } from "./dom.js";

export class Composer {
  /** `form` holds a text area and the buttons .send and .stop. */
  constructor(form, { onSend, onStop }) {
    this.area = form.querySelector("textarea");
    this.sendButton = form.querySelector(".send");
    this.stopButton = form.querySelector(".stop");
    this.running = false;
    this.enabled = false; // until there is a model
    this.grow = growWithText(this.area);
    const send = () => {
      const text = this.area.value;
      if (this.running || !this.enabled || text.trim() === "") return;
      this.write("");
      onSend(text);
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    this.area.addEventListener("keydown", (event) => {
      // In an input method Enter also confirms a character, which must not send the message.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    this.area.addEventListener("input", () => this.#update());
    this.stopButton.addEventListener("click", () => {
      onStop();
      this.area.focus();
    });
    this.#update();
  }

  write(text) {
    this.area.value = text;
    this.grow();
    this.#update();
  }

  setRunning(running) {
    const hadFocus = document.activeElement === this.sendButton || document.activeElement === this.stopButton;
    this.running = running;
    this.#update();
    if (hadFocus) this.area.focus();
  }

  setEnabled(enabled) {
    this.enabled = enabled;
    this.#update();
  }

  #update() {
    this.sendButton.hidden = this.running;
    this.stopButton.hidden = !this.running;
    this.sendButton.disabled = !this.enabled || this.area.value.trim() === "";
  }
}
