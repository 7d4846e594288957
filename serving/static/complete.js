// The page "Complete": a text model continues what a person writes.

import { Composer } from "./composer.js";
import { byId, element, iconButton } from "./dom.js";
import { announceReply, copyButton, ReplyView } from "./message.js";
import { fillPicker, findModel, noModelNotice } from "./models.js";
import { generate, newReply, replaceToken } from "./reply.js";

export class CompletePage {
  constructor() {
    this.models = [];
    this.picker = byId("complete-model");
    this.view = null;
    this.prompt = "";
    this.controller = null;
    this.composer = new Composer(byId("complete-composer"), { onSend: (text) => this.#start(text), onStop: () => this.stop() });
  }

  setModels(models) {
    this.models = models;
    const usable = fillPicker(this.picker, models, "text");
    this.composer.setEnabled(usable);
    byId("complete-notice").replaceChildren(...(usable ? [] : [noModelNotice(models, "text")]));
  }

  focus() {
    this.composer.area.focus();
  }

  stop() {
    this.controller?.abort();
    return this.controller !== null;
  }

  refresh() {
    this.view?.update();
  }

  #start(text) {
    this.prompt = text;
    byId("complete-welcome").hidden = true;
    const view = new ReplyView(newReply(this.picker.value), {
      actions: (reply) => this.#actions(reply),
      onReplace: (reply, index, alternative) => this.#run(replaceToken(reply, index, alternative)),
      onRetry: (reply) => this.#run(reply),
    });
    this.view = view;
    view.node.classList.add("document");
    view.node.setAttribute("aria-label", "Text");
    view.node.prepend(element("div", { class: "text prompt", dir: "auto" }, text));
    byId("document").replaceChildren(view.node);
    this.#run(view.reply);
  }

  #actions(reply) {
    const edit = () => {
      this.composer.write(this.prompt + reply.text);
      this.focus();
    };
    return [
      copyButton(() => this.prompt + reply.text),
      iconButton("edit", "Edit this text", edit),
      iconButton("play", "Continue this text", () => this.#run(reply)),
      iconButton("repeat", "Regenerate", () => this.#run(newReply(this.picker.value))),
    ];
  }

  async #run(reply) {
    const model = findModel(this.models, this.picker.value);
    const { view } = this;
    this.controller?.abort();
    const controller = (this.controller = new AbortController());
    this.composer.setRunning(true);
    reply.model = model.id;
    view.update(reply);
    await generate(reply, model, { prompt: this.prompt }, controller.signal, () => {
      if (view.reply === reply) view.update(reply);
    });
    if (this.controller !== controller) return;
    this.controller = null;
    this.composer.setRunning(false);
    announceReply(reply);
  }
}
