// Elements made from text. No file of this page parses HTML (no innerHTML or the like), so nothing that a person or
// a model writes can become markup.

/** Short for getElementById. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element: attributes by name, listeners as `onclick` and so on, children as nodes or strings.
 * An attribute that is null, undefined or false is left out; true makes it empty.
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Stroked paths on a grid of 24.
const ICONS = {
  add: "M12 5v14M5 12h14",
  bad: "M4 13h3V4H4zM7 13l4 8c1.4 0 2.2-1 2.2-2.3V15h5c1.2 0 2-1.1 1.7-2.2l-1.7-7.3c-.2-.9-1-1.5-1.9-1.5H7",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
  down: "M12 4v12M7 11l5 5 5-5M5 20h14",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  good: "M4 11h3v9H4zM7 11l4-8c1.4 0 2.2 1 2.2 2.3V9h5c1.2 0 2 1.1 1.7 2.2l-1.7 7.3c-.2.9-1 1.5-1.9 1.5H7",
  left: "M14 6l-6 6 6 6",
  menu: "M4 7h16M4 12h16M4 17h16",
  play: "M8 6l9 6-9 6z",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  repeat: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  right: "M10 6l6 6-6 6",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  stop: "M7 7h10v10H7z",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  up: "M12 17V5M7 10l5-5 5 5M5 20h14",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows only an icon; the label is read aloud and shown as a tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** Give the icons to the buttons in index.html that name one in data-icon. */
export function addIcons() {
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
}

let nextId = 0;
/** An id that no other element has, for labels and descriptions. */
export const uniqueId = (prefix) => `${prefix}-${(nextId += 1)}`;

/** Tell a screen reader. The same text twice in a row is read twice: the region is emptied in between. */
export function announce(text) {
  const status = byId("status");
  status.textContent = "";
  setTimeout(() => (status.textContent = text), 50);
}

/** Let a text area grow with its text; its max-height in the style sheet limits it. */
export function growWithText(area) {
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", grow);
  return grow;
}

/** Put text on the clipboard. Browsers offer navigator.clipboard only on https and on the loopback address. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // No permission: try the older way.
    }
  }
  const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true", value: text });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

/** Offer text as a file to save. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
