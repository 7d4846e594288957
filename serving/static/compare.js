// The page "Compare": one message, two models beside each other. Every message starts anew, so that both models
// always answer the same text. A text model continues the message instead of answering it.

import { Composer } from "./composer.js";
import { byId, element, iconButton } from "./dom.js";
import { announceReply, copyButton, ReplyView, userMessage } from "./message.js";
import { fillPicker, findModel, whereNoModel } from "./models.js";
import { generate, newReply, takeInstead } from "./reply.js";

export class ComparePage {
  constructor() {
    this.models = [];
    this.pickers = [byId("compare-left"), byId("compare-right")];
    this.log = byId("compare-messages");
    this.views = [];
    this.controllers = new Set();
    this.composer = new Composer(byId("compare-composer"), { onSend: (text) => this.#send(text), onStop: () => this.stop() });
  }

  setModels(models) {
    this.models = models;
    const [left, right] = this.pickers;
    const hadChoice = right.value !== "";
    const usable = fillPicker(left, models, null);
    fillPicker(right, models, null);
    if (!hadChoice && models.length > 1) right.value = models.find((model) => model.id !== left.value).id;
    this.composer.setEnabled(usable);
    byId("compare-notice").replaceChildren(...(usable ? [] : [whereNoModel(models, "chat")]));
  }

  focus() {
    this.composer.area.focus();
  }

  stop() {
    const running = this.controllers.size > 0;
    for (const controller of this.controllers) controller.abort();
    return running;
  }

  refresh() {
    for (const view of this.views) view.update();
  }

  #send(text) {
    byId("compare-welcome").hidden = true;
    const pair = element("div", { class: "pair" });
    this.log.append(userMessage(text, [copyButton(() => text)]), pair);
    for (const picker of this.pickers) this.#answer(text, findModel(this.models, picker.value), pair);
    byId("compare-scroll").scrollTop = byId("compare-scroll").scrollHeight;
  }

  #answer(text, model, pair) {
    const input = model.format === "text" ? { prompt: text } : { messages: [{ role: "user", content: text }] };
    let controller = null;
    const run = async (reply) => {
      controller?.abort();
      const own = (controller = new AbortController());
      this.controllers.add(own);
      this.composer.setRunning(true);
      view.update(reply);
      await generate(reply, model, input, own.signal, () => view.reply === reply && view.update(reply));
      this.controllers.delete(own);
      this.composer.setRunning(this.controllers.size > 0);
      if (view.reply === reply) announceReply(reply);
    };
    const view = new ReplyView(newReply(model.id), {
      actions: (reply) => [copyButton(() => reply.text), iconButton("repeat", "Regenerate", () => run(newReply(model.id)))],
      onTake: (reply, index, alternative) => run(newReply(model.id, { tokens: takeInstead(reply, index, alternative) })),
      onRetry: run,
    });
    view.node.setAttribute("aria-label", `Reply of ${model.id}`);
    this.views.push(view);
    pair.append(view.node);
    run(view.reply);
  }
}
