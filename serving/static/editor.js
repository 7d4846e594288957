// A message that is being edited: a text area replaces its article until the edit is sent or cancelled.

import { element, growWithText } from "./dom.js";

/** Edit `text` in the position of `node`. `choices` are [label, function of the new text]; Enter takes the first. */
export function editor(node, text, label, choices) {
  const opener = document.activeElement;
  const area = element("textarea", { class: "edit", "aria-label": label, rows: 1, value: text });
  const close = () => form.replaceWith(node);
  const finish = (choose) => {
    if (area.value.trim() === "") return;
    close();
    choose(area.value);
  };
  const buttons = choices.map(([name, choose], i) =>
    element("button", { type: "button", class: i === 0 ? "primary" : "secondary", onclick: () => finish(choose) }, name),
  );
  const cancel = () => {
    close();
    (node.contains(opener) ? opener : node.querySelector("button"))?.focus();
  };
  const form = element(
    "form",
    { class: "message editing", onsubmit: (event) => event.preventDefault() },
    area,
    element("div", { class: "dialog-buttons" }, element("button", { type: "button", class: "secondary", onclick: cancel }, "Cancel"), ...buttons),
  );
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) finish(choices[0][1]);
    else return;
    event.preventDefault();
    event.stopPropagation(); // Esc ends the editing and does not stop a reply
  });
  const grow = growWithText(area);
  node.replaceWith(form);
  grow();
  area.focus();
  form.scrollIntoView({ block: "nearest" });
  area.setSelectionRange(text.length, text.length);
}
