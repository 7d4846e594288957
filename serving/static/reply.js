// One reply while it is made: its text, its tokens with their probabilities, and its numbers.
//
// A token is {id, text, shown, logprob, top, bytes}: `text` is the token's own, `shown` what it adds to the reply (a
// token that ends inside a character shows nothing, the one that completes it shows the character), `top` its
// likeliest alternatives as {id, text, logprob, bytes}; `bytes` is only set where text cannot express them.
//
// The ids are those of one vocabulary. A model with another one cannot read them: it continues the text, which becomes
// the `start` of the reply, and only its own tokens follow. The text that a person wrote is also a start.

import { ApiError, streamEvents } from "./api.js";
import { requestFields } from "./settings.js";

const N_ALTERNATIVES = 8;
const encoder = new TextEncoder();

/** An id for a chat, a message or a reply. crypto.randomUUID only exists on https and on the loopback address. */
export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;

/** A reply that has nothing yet, or starts with the text and the tokens of a vocabulary that it continues. */
export function newReply(model, { start = "", tokens = [], vocabulary = null } = {}) {
  tokens = showTokens(tokens);
  return {
    id: newId(),
    model,
    text: start + shownText(tokens),
    start, // the text before the tokens
    tokens,
    vocabulary, // that the tokens belong to; null without tokens, undefined in replies from an older page: unknown
    finish: null, // "stop", "length", "stopped" by the person, "error"
    usage: null,
    nGenerated: 0,
    tokensPerSecond: null,
    digest: null, // of the model's weights
    feedback: null, // what the person thinks of it; see feedback.js
    waiting: null, // what the reply waits for, as a sentence
    error: null,
  };
}

/** Copies of the tokens with `shown` recomputed from their bytes. */
export function showTokens(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => ({ ...token, shown: decoder.decode(bytesOf(token), { stream: true }) }));
}

/** The text that the tokens add to a reply. */
export const shownText = (tokens) => tokens.map((token) => token.shown).join("");

const bytesOf = (token) => (token.bytes ? new Uint8Array(token.bytes) : encoder.encode(token.text));

/** A token as the API describes it, of a chat or of a text. */
function parseToken({ id, token, bytes, logprob, top_logprobs: top }) {
  const isText = !bytes || new TextDecoder().decode(new Uint8Array(bytes)) === token;
  const made = { id, text: token, logprob };
  if (!isText || token.includes("\ufffd")) made.bytes = bytes;
  if (top) made.top = top.map(parseToken);
  return made;
}

/** What identifies the vocabulary of a model, under any name; only GPT-2's has no digest. */
const vocabularyOf = ({ tokenizer }) => tokenizer.digest ?? tokenizer.name;

/** Make a reply ready for a model to continue: tokens of another or of an unknown vocabulary become text. */
function prepare(reply, model) {
  const vocabulary = vocabularyOf(model);
  if (reply.vocabulary === vocabulary && reply.tokens.every((token) => Number.isInteger(token.id))) {
    // The next tokens complete a character that the last ones leave incomplete and that is "\ufffd" in the text.
    reply.text = reply.start + shownText(reply.tokens);
  } else {
    Object.assign(reply, { start: reply.text, tokens: [], vocabulary });
  }
}

function bodyOf(reply, model, { messages, prompt }) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, ...requestFields() };
  const { start } = reply;
  const ids = reply.tokens.map((token) => token.id);
  if (messages) {
    Object.assign(body, { messages, logprobs: true, top_logprobs: N_ALTERNATIVES });
    if (start) {
      body.messages = [...messages, { role: "assistant", content: start }];
      body.continue_final_message = true;
    }
    if (ids.length > 0) body.assistant_prefix_ids = ids;
  } else {
    Object.assign(body, { prompt: prompt + start, logprobs: N_ALTERNATIVES });
    if (ids.length > 0) body.prefix_ids = ids;
  }
  return body;
}

/**
 * Continue `reply` until the model stops, the person stops it through `signal`, or an error ends it. Never throws:
 * what happened is in reply.finish and reply.error. `onUpdate(reply)` is called after every change.
 */
export async function generate(reply, model, input, signal, onUpdate) {
  const path = input.messages ? "v1/chat/completions" : "v1/completions";
  const { text: before, start, tokens, vocabulary } = reply;
  prepare(reply, model);
  // The tokens that the reply starts with may end inside a character.
  const decoder = new TextDecoder();
  for (const token of reply.tokens) decoder.decode(bytesOf(token), { stream: true });
  const onBusy = (seconds) => {
    reply.waiting = `The server is busy. Trying again in ${seconds} s.`;
    onUpdate(reply);
  };
  Object.assign(reply, { finish: null, error: null, usage: null, tokensPerSecond: null, digest: null, feedback: null, waiting: "Waiting for the model." });
  onUpdate(reply);
  let firstTime = 0;
  let nTimed = 0;
  try {
    for await (const event of streamEvents(path, bodyOf(reply, model, input), { signal, onBusy })) {
      if (event === null) {
        reply.waiting = "Waiting for other replies to finish.";
      } else {
        if (event.usage) reply.usage = event.usage;
        reply.digest = event.system_fingerprint ?? reply.digest;
        const choice = event.choices?.[0];
        const text = choice?.delta?.content ?? choice?.text ?? "";
        const more = choice?.logprobs?.content?.map(parseToken) ?? [];
        for (const token of more) reply.tokens.push({ ...token, shown: decoder.decode(bytesOf(token), { stream: true }) });
        reply.text += text;
        if (more.length > 0 || text) {
          reply.waiting = null;
          reply.nGenerated += more.length || 1;
          // The first token's time is the prompt's; the speed is that of the tokens after it.
          const now = performance.now();
          if (firstTime === 0) firstTime = now;
          else {
            nTimed += more.length || 1;
            reply.tokensPerSecond = (1000 * nTimed) / Math.max(1, now - firstTime);
          }
        }
        if (choice?.finish_reason) reply.finish = choice.finish_reason;
      }
      onUpdate(reply);
    }
    reply.finish ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") reply.finish = "stopped";
    else if (error instanceof ApiError) {
      reply.finish = "error";
      reply.error = { message: error.message, advice: error.advice };
    } else throw error;
  }
  // If nothing came, the reply keeps its old tokens.
  if (reply.tokens.length === 0 && reply.text === before) Object.assign(reply, { start, tokens, vocabulary });
  reply.waiting = null;
  onUpdate(reply);
}

/** A reply that starts with the one given up to the token at `index`, which one of its alternatives replaces. */
export function replaceToken({ model, start, tokens, vocabulary }, index, alternative) {
  const { top } = tokens[index];
  const kept = [...tokens.slice(0, index), { ...alternative, top }];
  return newReply(model, { start, tokens: kept, vocabulary });
}

/** One line of numbers: tokens, tokens per second, why it ended. */
export function describe(reply) {
  const parts = [reply.corrects ? "written by you" : reply.model];
  const n = reply.tokens.length || reply.usage?.completion_tokens || reply.nGenerated;
  if (n) parts.push(n === 1 ? "1 token" : `${n.toLocaleString("en")} tokens`);
  if (reply.tokensPerSecond) parts.push(`${reply.tokensPerSecond.toLocaleString("en", { maximumSignificantDigits: 3 })} tokens/s`);
  if (reply.finish === "length") parts.push("reached the limit");
  if (reply.finish === "stopped") parts.push("stopped");
  const dropped = reply.usage?.dropped_messages;
  if (dropped) parts.push(dropped === 1 ? "the oldest message no longer fits" : `the oldest ${dropped} messages no longer fit`);
  return parts.join(" · ");
}
