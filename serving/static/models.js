// The models of the server and the pickers that show them.

import { element } from "./dom.js";

export const findModel = (models, id) => models?.find((model) => model.id === id);

/** Whether a model is of the kind that a page needs; null needs none in particular. */
const fits = (model, format) => format === null || model.format === format;

function describeModel(model) {
  const millions = model.parameters / 1e6;
  const size = Number.isFinite(millions) ? `, ${millions >= 10 ? Math.round(millions) : millions.toFixed(1)} million parameters` : "";
  return `${model.format === "text" ? "text model" : "chat model"}${size}${model.dataset ? `, trained on ${model.dataset}` : ""}`;
}

/** Fill a picker with the models that fit, keeping its choice; false if there is none. */
export function fillPicker(picker, models, format, wanted = null) {
  const before = wanted ?? picker.value;
  const usable = models.filter((model) => fits(model, format));
  picker.replaceChildren(
    ...usable.map((model) => element("option", { value: model.id, title: describeModel(model) }, model.id)),
  );
  if (usable.some((model) => model.id === before)) picker.value = before;
  picker.disabled = usable.length === 0;
  return usable.length > 0;
}

/** A notice that the server has no model of a kind, and what to do. */
export function noModelNotice(models, format) {
  const example = format === "chat" ? "models/chitchat1150.pt" : "models/story5000.pt";
  const other = format === "chat" ? "The server has only text models: use the page “Complete”," : "The server has only chat models: use the page “Chat”,";
  const start = models.length > 0 ? `${other} or` : "The server has no model:";
  const wanted = format === "chat" ? "a chat model" : "a text model";
  return element("p", { class: "notice" }, `${start} start the server with ${wanted}, for example `, element("code", {}, `python serve.py ${example}`), ".");
}
