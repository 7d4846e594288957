// Requests to the server that sent this page: models, streams of events, and errors with what to do about them.

const KEY = "jojo.key"; // in sessionStorage: the key is forgotten when the tab is closed
const MAX_RETRIES = 20; // after 429, each after the delay that the server asks for

/** What went wrong, and in `advice` what a person can do about it. */
export class ApiError extends Error {
  constructor(message, { status = 0, advice = "", retryAfter = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, advice, retryAfter, code });
  }
}

let askForKey = async () => null;
let asking = null; // two requests that are refused at the same time ask once

/** Set the function that asks a person for the API key after a 401; it returns null if they give none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

const ADVICE = {
  400: "Change the message or the settings and try again.",
  401: "Ask whoever started the server for its API key.",
  403: "The server does not accept requests from this address. Open the address that serve.py printed.",
  404: "Choose another model, or reload the page to see what the server has now.",
  413: "The message is too large. Shorten it and try again.",
  429: "Many people are using the server. Wait a moment and try again.",
  500: "Something went wrong on the server. Its terminal shows the details.",
  503: "The server is starting or stopping. Wait a moment and try again.",
  507: "Ask whoever started the server to free some space, or export your feedback.",
};
const UNREACHABLE = "Check that serve.py is still running and that you are connected, then try again.";

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy in between may answer with a page of its own.
  }
  const message = typeof error.message === "string" ? error.message : `The server answered with status ${response.status}.`;
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ApiError(message, {
    status: response.status,
    advice: ADVICE[response.status] ?? ADVICE[response.status < 500 ? 400 : 500],
    retryAfter: Number.isFinite(seconds) ? Math.max(1, seconds) : null,
    code: error.code ?? null,
  });
}

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    // A relative address: the page also works where a reverse proxy serves it under a path.
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", { advice: UNREACHABLE, code: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** Wait for `seconds`, calling `tick` with those left; throws AbortError when `signal` aborts. */
export async function countDown(seconds, signal, tick) {
  for (let left = seconds; left > 0; left -= 1) {
    tick(left);
    await new Promise((resolve, reject) => {
      const abort = () => {
        clearTimeout(timer);
        reject(signal.reason);
      };
      const timer = setTimeout(() => {
        signal?.removeEventListener("abort", abort);
        resolve();
      }, 1000);
      signal?.addEventListener("abort", abort, { once: true });
    });
    signal?.throwIfAborted();
  }
}

/** Send, ask for the key on 401, and wait on 429; `onBusy(seconds left)` is called while waiting. */
async function request(path, body, { signal, onBusy = () => {} } = {}) {
  for (let retries = 0; ; retries += 1) {
    try {
      return await send(path, body, signal);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) {
        asking ??= askForKey(sessionStorage.getItem(KEY) !== null).finally(() => (asking = null));
        const key = await asking;
        if (key === null) throw error;
        sessionStorage.setItem(KEY, key);
      } else if (error.status === 429 && error.retryAfter !== null && retries < MAX_RETRIES) {
        await countDown(error.retryAfter, signal, onBusy);
      } else {
        throw error;
      }
    }
  }
}

/** The models of the server, as GET /v1/models lists them, and whether it keeps feedback. */
export async function listModels() {
  const answer = await (await request("v1/models", null)).json();
  return { models: answer.data, keepsFeedback: answer.keeps_feedback === true };
}

/** Send what a person thinks of a reply; returns once it is on the server's disk. */
export async function postFeedback(event) {
  await request("v1/feedback", event);
}

/**
 * POST a request that streams, and yield its events as objects; null for a comment line, which the server sends
 * while the request waits in the queue. Throws ApiError if the stream ends before its end marker.
 */
export async function* streamEvents(path, body, options) {
  const response = await request(path, body, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) yield null;
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") complete = true;
        if (complete) return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, { advice: ADVICE[500], code: event.error.code });
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    // Everything else (a TypeError or a cut line) means that the connection ended in the middle.
  } finally {
    if (!complete) reader.cancel().catch(() => {}); // tells the server that nobody reads any more
  }
  throw new ApiError("The connection was lost before the reply was complete.", { advice: UNREACHABLE, code: "lost" });
}
