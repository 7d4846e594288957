// The page "Compare": one message, two models side by side. Every message starts a new chat, so that both models
// always answer the same text. A text model continues the message instead of answering it.

import { Composer } from "./composer.js";
import { byId, element, iconButton } from "./dom.js";
import { editor } from "./editor.js";
import { correct, eventOf, feedbackButtons, preferenceEvent, sendEvent, wordButton } from "./feedback.js";
import { announceReply, copyButton, ReplyView, userMessage } from "./message.js";
import { fillPicker, findModel, noModelNotice } from "./models.js";
import { generate, newReply, replaceToken } from "./reply.js";

export class ComparePage {
  constructor() {
    this.models = [];
    this.pickers = [byId("compare-left"), byId("compare-right")];
    this.log = byId("compare-messages");
    this.views = [];
    this.controllers = new Set();
    this.events = new Map(); // what the person thinks of the replies, by id; gone when the page is closed, as they are
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
    byId("compare-notice").replaceChildren(...(usable ? [] : [noModelNotice(models, "chat")]));
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
    const node = element("div", { class: "pair" });
    this.log.append(userMessage(text, [copyButton(() => text)]), node);
    const models = this.pickers.map((picker) => findModel(this.models, picker.value));
    const pair = { node, before: [{ role: "user", content: text }], canChat: models.every((model) => model.format !== "text"), sides: [], preferred: null };
    for (const model of models) this.#answer(text, model, pair);
    byId("compare-scroll").scrollTop = byId("compare-scroll").scrollHeight;
  }

  #answer(text, model, pair) {
    const input = model.format === "text" ? { prompt: text } : { messages: pair.before };
    let controller = null;
    const run = async (reply) => {
      controller?.abort();
      const own = (controller = new AbortController());
      this.controllers.add(own);
      this.composer.setRunning(true);
      view.update(reply);
      this.#showPreference(pair);
      await generate(reply, model, input, own.signal, () => view.reply === reply && view.update(reply));
      this.controllers.delete(own);
      this.composer.setRunning(this.controllers.size > 0);
      this.#showPreference(pair);
      if (view.reply === reply) announceReply(reply);
    };
    const side = { model, button: null };
    const view = (side.view = new ReplyView(newReply(model.id), {
      actions: (reply) => [
        ...this.#feedback(pair, side, reply),
        copyButton(() => reply.text),
        iconButton("repeat", "Regenerate", () => run(newReply(model.id))),
      ],
      onReplace: (reply, index, alternative) => run(replaceToken(reply, index, alternative)),
      onRetry: run,
    }));
    view.node.setAttribute("aria-label", `Reply of ${model.id}`);
    pair.sides.push(side);
    this.views.push(view);
    pair.node.append(view.node);
    run(view.reply);
  }

  // ---- feedback: on one reply, and which of the two is better ----

  #feedback(pair, side, reply) {
    if (side.model.format === "text") return []; // a continuation is not a reply to a message
    const onJudge = () => this.#keep(eventOf(reply, pair.before), side);
    const onImprove = () => this.#improve(reply, side, onJudge);
    const buttons = feedbackButtons(reply, { onJudge, onImprove });
    if (!pair.canChat) return buttons;
    side.button = wordButton("This one is better", false, () => this.#prefer(pair, side));
    this.#showPreference(pair);
    return [...buttons, side.button];
  }

  #improve(reply, side, onJudge) {
    const use = (text) => {
      correct(reply, text);
      side.view.update();
      side.view.node.querySelector(".word-button").focus();
      onJudge();
    };
    editor(side.view.node, reply.feedback?.correction ?? reply.text, "Say it better", [["Use this", use]]);
  }

  /** Whether the person prefers a side's reply to the other's, as both are now. */
  #isPreferred(pair, side) {
    const [better, worse] = pair.preferred ?? [];
    return side.view.reply === better && pair.sides.some((other) => other.view.reply === worse);
  }

  /** Two complete replies can be compared. */
  #showPreference(pair) {
    const complete = pair.sides.length === 2 && pair.sides.every(({ view }) => view.reply.finish !== null && view.reply.text.trim() !== "");
    for (const side of pair.sides.filter(({ button }) => button !== null)) {
      side.button.hidden = !complete;
      side.button.setAttribute("aria-pressed", String(this.#isPreferred(pair, side)));
    }
  }

  #prefer(pair, side) {
    const other = pair.sides.find((one) => one !== side);
    const [better, worse] = [side.view.reply, other.view.reply];
    const isWithdrawn = this.#isPreferred(pair, side);
    pair.preferred = isWithdrawn ? null : [better, worse];
    this.#showPreference(pair);
    const id = pair.sides.map(({ view }) => view.reply.id).join("+"); // the same, whichever is better
    this.#keep(preferenceEvent(id, better, worse, pair.before, isWithdrawn), side);
  }

  #keep(event, side) {
    if (event.rating === "none") this.events.delete(event.id);
    else this.events.set(event.id, event);
    sendEvent(event, side.view.notice);
  }
}
