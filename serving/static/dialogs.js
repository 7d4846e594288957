// Questions to the person: a text, a yes or no. One <dialog> shows them all; the browser keeps the focus inside it,
// closes it on Esc, and puts the focus back where it was.

import { byId, element, uniqueId } from "./dom.js";

function ask(title, content, buttonText, dangerous = false) {
  const dialog = byId("question");
  const confirm = element("button", { type: "submit", class: dangerous ? "primary dangerous" : "primary" }, buttonText);
  return new Promise((resolve) => {
    let answer = false;
    const cancel = element("button", { type: "button", class: "secondary", onclick: () => dialog.close() }, "Cancel");
    const onsubmit = (event) => {
      event.preventDefault();
      answer = true;
      dialog.close();
    };
    const heading = element("h2", { id: "question-title" }, title);
    dialog.replaceChildren(element("form", { onsubmit }, heading, content, element("div", { class: "dialog-buttons" }, cancel, confirm)));
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
  });
}

/** Ask for a text; null if the person cancels. */
export async function askForText(title, label, buttonText, { value = "", type = "text", help = null } = {}) {
  const id = uniqueId("question");
  const input = element("input", { id, type, value, required: true, autofocus: true, autocomplete: "off" });
  const field = element("div", { class: "field" }, element("label", { for: id }, label), input, help && element("p", { class: "help" }, help));
  const answer = ask(title, field, buttonText);
  input.select();
  return (await answer) ? input.value.trim() : null;
}

/** Ask before something that cannot be undone. */
export function askToConfirm(title, text, buttonText) {
  return ask(title, element("p", {}, text), buttonText, true);
}
