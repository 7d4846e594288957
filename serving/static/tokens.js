// Look inside a reply: its tokens coloured by their probability, and the alternatives of one of them.

import { byId, element } from "./dom.js";

// A token's colour says how surprising it was: the class of the first limit that its probability reaches.
const SURPRISE = [
  [0.9, "surprise-0"],
  [0.6, "surprise-1"],
  [0.3, "surprise-2"],
  [0.1, "surprise-3"],
  [0.02, "surprise-4"],
  [0, "surprise-5"],
];

const probability = (token) => (Number.isFinite(token.logprob) ? Math.exp(token.logprob) : null);
const surpriseOf = (token) => (probability(token) === null ? "unknown" : SURPRISE.find(([limit]) => probability(token) >= limit)[1]);

/** 0.341 as "34%", 0.0042 as "0.42%". */
export function percent(token) {
  const p = probability(token);
  if (p === null) return "unknown";
  if (p >= 0.1) return `${Math.round(100 * p)}%`;
  return p >= 0.0001 ? `${(100 * p).toPrecision(2)}%` : "<0.01%";
}

/** A token's text with the spaces and line breaks at its edges made visible. */
function visible(text) {
  if (text.trim() === "") return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "▫";
  return text.replace(/^ /, "␣").replaceAll("\n", "↵");
}

/** A token's text for screen readers, which do not read white space. */
function spoken(text) {
  if (text.trim() !== "") return text.trim();
  if (text === "") return "part of a character";
  const breaks = text.split("\n").length - 1;
  if (breaks > 0) return breaks === 1 ? "line break" : `${breaks} line breaks`;
  return text.length === 1 ? "space" : `${text.length} spaces`;
}

/**
 * The text `start` and the tokens of a reply in `node`. The tokens are one stop for the Tab key, in which the arrow keys
 * move from token to token.
 * `onReplace(index, alternative)` is called when a person chooses another token instead.
 */
export class TokenView {
  constructor(node, start, onReplace) {
    this.node = node;
    this.onReplace = onReplace;
    this.tokens = [];
    node.replaceChildren(start);
    node.setAttribute("role", "group");
    node.setAttribute("aria-label", "Tokens of the reply: the arrow keys move, Enter shows the alternatives");
    this.listeners = new AbortController();
    const { signal } = this.listeners;
    node.addEventListener("keydown", (event) => this.#onKey(event), { signal });
    node.addEventListener("click", (event) => this.#open(event.target.closest(".token")), { signal });
  }

  /** Show the tokens that are not shown yet. */
  update(tokens) {
    for (const token of tokens.slice(this.tokens.length)) {
      const first = this.tokens.length === 0;
      this.tokens.push(token);
      const text = token.shown === "" ? "▫" : token.shown.replaceAll("\n", "↵\n");
      const label = `${spoken(token.shown)}, ${percent(token)}`;
      this.node.append(
        element("span", { class: `token ${surpriseOf(token)}`, role: "button", tabindex: first ? 0 : -1, "aria-haspopup": "dialog", "aria-label": label, title: percent(token) }, text),
      );
    }
  }

  /** Back to an ordinary element. */
  remove() {
    this.listeners.abort();
    this.node.removeAttribute("role");
    this.node.removeAttribute("aria-label");
    this.node.replaceChildren();
  }

  focus(index) {
    const spans = this.node.children;
    const span = spans[Math.max(0, Math.min(index, spans.length - 1))];
    this.node.querySelector('[tabindex="0"]')?.setAttribute("tabindex", -1);
    span?.setAttribute("tabindex", 0);
    span?.focus();
  }

  #onKey(event) {
    const index = [...this.node.children].indexOf(event.target);
    const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, ArrowUp: index - 10, ArrowDown: index + 10, Home: 0, End: Infinity };
    if (event.key in moves) this.focus(moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.#open(event.target);
    else return;
    event.preventDefault();
  }

  #open(span) {
    if (!span) return;
    const index = [...this.node.children].indexOf(span);
    this.focus(index);
    showAlternatives(span, this.tokens[index], (alternative) => this.onReplace(index, alternative));
  }
}

const same = (one, other) => (Number.isInteger(one.id) && Number.isInteger(other.id) ? one.id === other.id : one.text === other.text);

/** The list of a token's alternatives, next to the token. */
function showAlternatives(span, token, onReplace) {
  const popup = byId("alternatives");
  const listed = [...(token.top ?? [])];
  if (!listed.some((one) => same(one, token))) listed.push(token); // drawn from further down
  listed.sort((one, other) => other.logprob - one.logprob);

  const close = () => {
    if (popup.hidden) return;
    popup.hidden = true;
    outside.abort();
    if (popup.contains(document.activeElement) || document.activeElement === document.body) span.focus();
  };
  const outside = new AbortController();
  const buttons = listed.map((alternative) => {
    const isChosen = same(alternative, token);
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * (probability(alternative) ?? 0)}%`;
    const onclick = () => {
      close();
      if (!isChosen) onReplace(alternative);
    };
    const label = `${spoken(alternative.text)}, ${percent(alternative)}, ${isChosen ? "the token that was drawn" : "use this one instead"}`;
    return element(
      "button",
      { type: "button", class: "alternative", "aria-label": label, "aria-current": isChosen && "true", onclick },
      element("span", { class: "alternative-text" }, visible(alternative.text)),
      bar,
      element("span", { class: "alternative-percent" }, percent(alternative)),
    );
  });
  const hint = token.top ? "Choose a token to use it instead; the reply continues from there." : "The alternatives of this token were not kept.";
  popup.replaceChildren(element("p", { class: "help" }, hint), ...buttons);
  popup.hidden = false;
  placeBelow(popup, span);
  (buttons.find((button) => button.hasAttribute("aria-current")) ?? buttons[0]).focus();

  const { signal } = outside;
  popup.addEventListener(
    "keydown",
    (event) => {
      const index = buttons.indexOf(document.activeElement);
      const moves = { ArrowUp: index - 1, ArrowDown: index + 1, Home: 0, End: buttons.length - 1 };
      if (event.key in moves) buttons[(moves[event.key] + buttons.length) % buttons.length].focus();
      else if (event.key === "Escape" || event.key === "Tab") close();
      else return;
      event.preventDefault();
      event.stopPropagation(); // Esc closes the list and does not stop a reply
    },
    { signal },
  );
  document.addEventListener("pointerdown", (event) => popup.contains(event.target) || close(), { signal });
  window.addEventListener("resize", close, { signal });
  document.addEventListener("scroll", (event) => popup.contains(event.target) || close(), { signal, capture: true });
}

/** Below the token, or above it where the window ends. */
function placeBelow(popup, span) {
  const margin = 8;
  const rectangle = span.getClientRects()[0];
  const { offsetWidth: width, offsetHeight: height } = popup;
  const below = rectangle.bottom + margin;
  const top = below + height < window.innerHeight ? below : Math.max(margin, rectangle.top - height - margin);
  popup.style.top = `${top}px`;
  popup.style.left = `${Math.max(margin, Math.min(rectangle.left, window.innerWidth - width - margin))}px`;
}
