// The sampling settings: what they are, their dialog, and the fields of a request that they become.
//
// Only what a person has set is kept and sent. An empty field leaves the choice to the server, which has defaults for
// each model (those of gen.py); they are shown in the empty fields.

import { announce, byId, element } from "./dom.js";

const STORED = "jojo.settings";

// Names and ranges are those of the API. `fallback` is what the server uses unless a model has its own default.
const SETTINGS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: "any", help: "Lower is more focused. 0 always takes the likeliest token." },
  { name: "top_k", label: "Top k", min: 0, max: 100_000, step: 1, help: "Draw from this many of the likeliest tokens. 0: from all." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: "any", fallback: 1, help: "Draw from the likeliest tokens that together have this probability." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: "any", fallback: 0, help: "Draw from tokens at least this many times as likely as the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 100, step: "any", fallback: 1, help: "Above 1: tokens that occurred before become less likely." },
  { name: "max_tokens", label: "Longest reply", min: 1, max: 1_000_000, step: 1, fallback: "as the window allows", help: "In tokens." },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, fallback: "a new one each time", help: "The same seed draws the same reply again." },
];
const STOP_HELP = "The reply ends before any of these texts. One per line; \\n means a line break.";

let values = read();

function read() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

/** The settings as fields of a request. */
export function requestFields() {
  return { ...values };
}

function defaultOf(setting, model) {
  return model?.default?.[setting.name] ?? setting.fallback ?? "the model's own";
}

/** Make the dialog; `currentModel()` names the model whose defaults it shows. */
export function setUpSettings(currentModel) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const fields = byId("settings-fields");
  const inputs = new Map();
  for (const setting of SETTINGS) {
    const id = `setting-${setting.name}`;
    const input = element("input", { id, type: "number", inputmode: "decimal", min: setting.min, max: setting.max, step: setting.step, "aria-describedby": `${id}-help` });
    inputs.set(setting.name, input);
    fields.append(
      element("div", { class: "field" }, element("label", { for: id }, setting.label), input, element("p", { id: `${id}-help`, class: "help" }, setting.help)),
    );
  }
  const stop = element("textarea", { id: "setting-stop", rows: 2, spellcheck: "false", "aria-describedby": "setting-stop-help" });
  fields.append(
    element("div", { class: "field" }, element("label", { for: "setting-stop" }, "Stop texts"), stop, element("p", { id: "setting-stop-help", class: "help" }, STOP_HELP)),
  );

  const show = () => {
    for (const setting of SETTINGS) {
      const input = inputs.get(setting.name);
      input.value = values[setting.name] ?? "";
      input.placeholder = defaultOf(setting, currentModel());
    }
    stop.value = (values.stop ?? []).map((text) => text.replaceAll("\n", "\\n")).join("\n");
    byId("open-settings").classList.toggle("changed", Object.keys(values).length > 0);
  };
  const keep = () => {
    if (Object.keys(values).length > 0) localStorage.setItem(STORED, JSON.stringify(values));
    else localStorage.removeItem(STORED);
    show();
  };

  byId("open-settings").addEventListener("click", () => {
    show();
    dialog.showModal();
  });
  byId("reset-settings").addEventListener("click", () => {
    values = {};
    keep();
    announce("All settings are back to their defaults.");
  });
  byId("close-settings").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", (event) => {
    event.preventDefault(); // the browser has checked the ranges
    values = {};
    for (const [name, input] of inputs) if (input.value !== "") values[name] = input.valueAsNumber;
    const stops = stop.value.split("\n").filter((line) => line !== "");
    if (stops.length > 0) values.stop = stops.map((line) => line.replaceAll("\\n", "\n"));
    keep();
    dialog.close();
  });
  show();
}
