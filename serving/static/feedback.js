// What a person thinks of a reply: good, bad, or how to say it better. It is kept with the reply in the browser, can
// be exported, and is sent to the server if that keeps feedback (serve.py --feedback FILE).
//
// reply.feedback: {rating: "good" or "bad", correction: text, time}. An event is what the server appends to its file
// and what the export contains; docs/data.md describes it.

import { ApiError, postFeedback } from "./api.js";
import { byId, download, element, iconButton } from "./dom.js";
import { errorBox } from "./message.js";
import { shownText } from "./reply.js";
import { allChats, askedMessages, loadChat } from "./store.js";

let isSent = false;
let sending = Promise.resolve(); // one event after another: of two about one reply, the file's last one counts

/** Set and show whether the server keeps feedback. */
export function setKept(kept) {
  isSent = kept;
  byId("feedback-kept").textContent = kept ? "This server keeps ratings and their conversations." : "Ratings stay in this browser.";
}

const isJudged = ({ feedback }) => Boolean(feedback?.rating || feedback?.correction);

/** Record what a person thinks of a reply now. */
function judge(reply, change) {
  reply.feedback = { ...reply.feedback, ...change, time: new Date().toISOString() };
}

/** Record a person's better reply. True if it is the model's own text, which withdraws a correction. */
export function correct(reply, text) {
  const isSame = text.trim() === reply.text.trim();
  judge(reply, { correction: isSame ? undefined : text });
  return isSame;
}

/** The model, its digest, and the ids of the tokens if they give the reply's text (an edited one has others). */
function originOf({ model, digest, tokens, text }) {
  const ids = tokens.map((token) => token.id);
  const complete = ids.length > 0 && ids.every(Number.isInteger) && shownText(tokens) === text;
  return { model, digest: digest ?? undefined, token_ids: complete ? ids : undefined };
}

/** What a person thinks of a reply to the messages `before`. */
export function eventOf(reply, before) {
  const { rating, correction, time } = reply.feedback ?? {};
  const messages = [...before, { role: "assistant", content: reply.text }];
  return { id: reply.id, time, ...originOf(reply), messages, rating: isJudged(reply) ? rating : "none", correction };
}

/** The event that a person prefers the reply `better` to `worse`, or no longer does. Both answer the messages `before`. */
export function preferenceEvent(id, better, worse, before, isWithdrawn) {
  const messages = [...before, { role: "assistant", content: better.text }];
  const event = { id, time: new Date().toISOString(), ...originOf(better), messages };
  return isWithdrawn ? { ...event, rating: "none" } : { ...event, preferred_over: { ...originOf(worse), content: worse.text } };
}

/** Send an event if the server keeps feedback; `area` shows an error with a button that tries again. */
export async function sendEvent(event, area) {
  if (!isSent) return;
  const sent = sending.then(() => postFeedback(event));
  sending = sent.catch(() => {}); // what went wrong with this event, below, does not stop the next one
  try {
    await sent;
    area.replaceChildren();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    area.replaceChildren(errorBox(error, () => sendEvent(event, area)));
  }
}

/** A button whose text says what it does, and which can be pressed. */
export function wordButton(text, pressed, onclick) {
  return element("button", { type: "button", class: "word-button", "aria-pressed": String(pressed), onclick }, text);
}

/**
 * The buttons with which a person judges a reply. `onJudge()` is called after a change of reply.feedback, `onImprove()`
 * when the person wants to write a better reply. `only` leaves the ratings out.
 */
export function feedbackButtons(reply, { onJudge, onImprove, only = false }) {
  const ratings = ["good", "bad"];
  const pressed = (rating) => String(reply.feedback?.rating === rating);
  const rate = (rating) => () => {
    judge(reply, { rating: reply.feedback?.rating === rating ? undefined : rating });
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", pressed(ratings[i]))); // in place: keeps the focus
    onJudge();
  };
  const buttons = ratings.map((rating) => iconButton(rating, rating === "good" ? "Good" : "Bad", rate(rating), { "aria-pressed": pressed(rating) }));
  return [...(only ? [] : buttons), wordButton("Say it better", Boolean(reply.feedback?.correction), onImprove)];
}

/** The events of all chats: one for each reply that a person has judged. */
function* eventsOfChats() {
  for (const { id } of allChats()) {
    const chat = loadChat(id);
    for (const message of chat.messages) {
      for (const reply of (message.versions ?? []).filter(isJudged)) yield eventOf(reply, askedMessages(chat, message, reply));
    }
  }
}

/** Save the feedback of all chats and `more` events as JSONL, which data/prepare-preferences.py reads; returns how many. */
export function exportFeedback(more) {
  const lines = [...eventsOfChats(), ...more].map((event) => `${JSON.stringify(event)}\n`);
  if (lines.length > 0) download("jojo-feedback.jsonl", lines.join(""));
  return lines.length;
}
