/**
 * Watches one stream of chat-relay, live, to its end, over as many connections as it takes.
 * For browsers and Node from 20 on; needs nothing but `fetch`.
 *
 *     import { watch } from "/relay.js";
 *     const outcome = await watch("/streams/ID/events", {
 *       onReset: () => (answer.textContent = ""),
 *       onText: (text) => (answer.textContent += text),
 *     });
 *
 * Nothing is kept beyond the call. A cursor is worth something only beside the text before it, and
 * that text is on the server: who comes anew is sent the whole answer from its newest `started`. A
 * copy in the browser would outlive the stream when that is erased, and be written anew with every
 * chunk.
 *
 * @typedef {{ kind: "event", id: string | null, event: string, data: string }} EventFrame
 * @typedef {EventFrame | { kind: "comment", text: string } | { kind: "retry", ms: number }} Frame
 *
 * @typedef {object} Outcome
 * @property {"completed" | "failed" | "cancelled" | "gone" | "corrupt" | "ended"} kind
 *   `gone`: unknown, erased, expired or lost. `corrupt`: twice it came otherwise than the server
 *   says it is; never show it as whole. `ended`: it is over, and the cursor that you gave in `url`
 *   or `headers` says that you have been told how. The rest is the data of the terminal event, or
 *   of the problem: finish_reason, usage, chunks, sha256; code, message, retryable, retry_after,
 *   upstream.
 * @property {string} [code]
 * @property {string} [message]
 * @property {string} [finish_reason]
 *
 * @typedef {object} Options
 * @property {(text: string) => void} [onText] The next piece of the answer. Join pieces as strings:
 *   an emoji may come as two halves.
 * @property {(attempt: number) => void} [onReset] Clear what you have: the answer begins, or begins
 *   anew.
 * @property {(outcome: Outcome & Record<string, any>) => void} [onDone] Once, at the end.
 * @property {(event: { id: string | null, event: string, data: any }) => void} [onEvent] Every
 *   event, before what follows from it.
 * @property {(text: string) => void} [onComment] What is being waited for, for people.
 * @property {() => void} [onOpen] A connection stands.
 * @property {() => void} [onLost] It does not, or could not be made; it will be tried again.
 * @property {AbortSignal} [signal] Ends the watching; the answer itself goes on.
 * @property {HeadersInit} [headers] Of every request.
 * @property {number} [tries] Give up after so many connections in a row that brought no event.
 * @property {number} [silenceMs] A connection that is silent for longer is dead.
 * @property {typeof globalThis.fetch} [fetch]
 */

const SILENCE_MS = 45_000; // Three heartbeats of the server.
const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 5000;
const SHORTEST_WAIT_MS = 100; // A `retry: 0` must not become a storm.
const LONGEST_TIMER_MS = 2 ** 31 - 1; // A longer one, such as Infinity, goes off at once.
const ENDINGS = new Set(["completed", "failed", "cancelled"]);

/** The server said no, and coming back would not mend it. */
export class Refused extends Error {
  name = "Refused";

  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** As often in a row as `tries` allows, no connection brought an event. */
export class Unreachable extends Error {
  name = "Unreachable";
}

/**
 * @param {string | URL} url Of the events: `/streams/ID/events`.
 * @param {Options} [options]
 * @returns {Promise<Outcome & Record<string, any>>} What `onDone` was told. Rejects with the reason
 *   of `signal`, with Refused, with Unreachable, with TypeError where no request can have the URL
 *   or the headers, or with what a callback threw.
 */
export async function watch(url, options = {}) {
  const { signal, tries = Infinity } = options;
  const tell = teller(options);
  const answer = new Answer(tell);
  let retryMs = FIRST_WAIT_MS;
  let failures = 0;
  for (;;) {
    signal?.throwIfAborted();
    failures += 1;
    for await (const frame of connection(url, answer.cursor, options, tell)) {
      if (frame.kind === "comment") tell("onComment", frame.text);
      else if (frame.kind === "retry") retryMs = Math.max(frame.ms, SHORTEST_WAIT_MS);
      else {
        failures = 0;
        const outcome = frame.kind === "event" ? await answer.take(frame) : frame.outcome;
        if (outcome === AGAIN) break;
        if (outcome) {
          tell("onDone", outcome);
          return outcome;
        }
      }
    }
    signal?.throwIfAborted();
    if (failures >= tries) throw new Unreachable("The server cannot be reached: try again.");
    tell("onLost");
    await sleep(backoff(retryMs, failures), signal);
  }
}

/** Calls back, and nobody after the signal: that may come at any time, from a callback as well.
 * @param {Options} options
 * @returns {(name: keyof Options, ...told: any[]) => void} */
function teller(options) {
  return (name, ...told) => {
    options.signal?.throwIfAborted();
    /** @type {any} */ (options[name])?.(...told);
  };
}

/** Never earlier than the server asked for, and not together with everybody else.
 * @param {number} retryMs @param {number} failures In a row, up to now. */
function backoff(retryMs, failures) {
  const ceiling = Math.max(retryMs, Math.min(retryMs * 2 ** (failures - 1), LONGEST_WAIT_MS));
  return ceiling * (1 + Math.random() / 2);
}

/** @param {number} ms @param {AbortSignal} [signal] @returns {Promise<void>} */
function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted(); // It would never say so again.
    const stop = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, Math.min(ms, LONGEST_TIMER_MS));
    signal?.addEventListener("abort", stop, { once: true });
  });
}

const AGAIN = Symbol("again");

/** What one viewer has, and where it stands. */
class Answer {
  cursor = "";
  #text = "";
  #chunks = 0;
  #attempt = 0;
  // Without it the text before the cursor is the caller's, and nothing can be said of the whole.
  #begun = false;
  #replayed = false;

  /** @param {ReturnType<typeof teller>} tell */
  constructor(tell) {
    this.tell = tell;
  }

  /**
   * @param {EventFrame} frame
   * @returns {Promise<Outcome | typeof AGAIN | null>} The outcome, if this was the end; AGAIN if it
   *   is to be asked for once more, from its beginning.
   */
  async take({ id, event, data }) {
    const value = JSON.parse(data);
    this.cursor = id ?? this.cursor;
    this.tell("onEvent", { id, event, data: value });
    if (event === "started") this.#begin(value.attempt);
    if (event === "chunk") this.#grow(value.text);
    if (!ENDINGS.has(event)) return null;
    // It has no id because it is in no log: the stream went away under its viewers.
    if (event === "failed" && id === null) return { ...value, kind: "gone" };
    if (event !== "completed" || (await this.#isWhole(value))) return { ...value, kind: event };
    if (this.#replayed) return { ...value, kind: "corrupt" };
    this.#replayed = true;
    this.cursor = "";
    this.#begin(this.#attempt);
    return AGAIN;
  }

  /** @param {number} attempt */
  #begin(attempt) {
    this.#text = "";
    this.#chunks = 0;
    this.#attempt = attempt;
    this.#begun = true;
    this.tell("onReset", attempt);
  }

  /** @param {string | undefined} text None in a chunk of tool calls, usage and the like. */
  #grow(text) {
    this.#chunks += 1;
    if (!text) return;
    this.#text += text;
    this.tell("onText", text);
  }

  /** @param {{ chunks?: number, sha256?: string }} told */
  async #isWhole({ chunks, sha256 }) {
    if (!this.#begun) return true;
    if (chunks !== undefined && chunks !== this.#chunks) return false;
    const mine = sha256 && (await digest(this.#text));
    return !mine || mine === sha256;
  }
}

/** SHA-256 in hexadecimal; null where the browser has none, which is on a page over plain http.
 * @param {string} text Of which half an emoji without its other half counts as U+FFFD. */
async function digest(text) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) return null;
  const bytes = new Uint8Array(await subtle.digest("SHA-256", new TextEncoder().encode(text)));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * One connection: its frames, until it ends, however it does; or the outcome that its status tells.
 *
 * @param {string | URL} url
 * @param {string} cursor Or "" for all from the newest `started`.
 * @param {Options} options
 * @param {ReturnType<typeof teller>} tell
 * @returns {AsyncGenerator<Frame | { kind: "outcome", outcome: Outcome }, void>} Throws Refused.
 */
async function* connection(url, cursor, options, tell) {
  const { headers, signal, silenceMs = SILENCE_MS, fetch = globalThis.fetch } = options;
  const pulse = new Pulse(silenceMs, signal);
  try {
    // In a plain object a `Last-Event-ID` of the caller's would stand beside ours, and both be sent.
    const request = new Headers(headers);
    request.set("accept", "text/event-stream");
    if (cursor) request.set("last-event-id", cursor);
    const response = await orNull(
      fetch(url, { headers: request, cache: "no-store", signal: pulse.signal }),
    );
    if (!response) {
      // No try mends a URL that no request can have. A fetch of the caller's may take it, though.
      if (!options.fetch) new Request(url);
      return;
    }
    if (!isStream(response)) {
      const outcome = await verdict(response);
      if (outcome) yield { kind: "outcome", outcome };
      return;
    }
    tell("onOpen");
    const parse = parser();
    const reader = response.body.getReader();
    for (let piece; (piece = await orNull(reader.read())) && piece.value; ) {
      pulse.beat();
      yield* parse(piece.value);
    }
  } finally {
    pulse.end();
  }
}

/** Whatever a network does is one thing here: the connection is no more.
 * @template T @param {Promise<T>} promise @returns {Promise<T | null>} */
function orNull(promise) {
  return promise.catch(() => null);
}

/** @param {Response} response
 * @returns {response is Response & { body: ReadableStream<Uint8Array> }} */
function isStream(response) {
  const type = response.headers.get("content-type") ?? "";
  return response.status === 200 && !!response.body && type.startsWith("text/event-stream");
}

/** What a response that is no stream means; null: come back, as after any page of a proxy.
 * @param {Response} response @returns {Promise<Outcome | null>} Throws Refused. */
async function verdict(response) {
  const { status } = response;
  if (status === 204) return { kind: "ended" };
  if (status === 200 || status === 408 || status === 429 || status >= 500) return null;
  const problem = await response.json().catch(() => ({}));
  const message = problem.detail ?? inWords(status);
  if (status === 404 || status === 410) return { kind: "gone", code: problem.code, message };
  throw new Refused(status, message);
}

/** What to tell people where no problem of ours does, as when a proxy in between answers.
 * @param {number} status */
export function inWords(status) {
  const mend = status === 401 || status === 403 ? "sign in, then reload" : "try again";
  return `The server answered ${status}: ${mend}.`;
}

/** Aborts when there was no beat for too long, or when the caller's signal does. */
class Pulse {
  #controller = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /** @param {number} silenceMs @param {AbortSignal} [outer] */
  constructor(silenceMs, outer) {
    this.silenceMs = silenceMs;
    this.outer = outer;
    outer?.addEventListener("abort", this.end);
    this.beat();
  }

  get signal() {
    return this.#controller.signal;
  }

  beat() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.end, Math.min(this.silenceMs, LONGEST_TIMER_MS));
  }

  end = () => {
    clearTimeout(this.#timer);
    this.outer?.removeEventListener("abort", this.end);
    this.#controller.abort();
  };
}

/**
 * A decoder of server-sent events: a function from the next bytes, however they are cut, to the
 * frames that they complete. What has no blank line behind it never was an event.
 *
 * @returns {(bytes: Uint8Array) => Frame[]}
 */
export function parser() {
  const decoder = new TextDecoder();
  const fields = new Fields();
  let rest = "";
  let afterCr = false;
  return (bytes) => {
    let text = decoder.decode(bytes, { stream: true });
    if (!text) return [];
    // A CR ends its line at once; the LF that may belong to it can come much later.
    if (afterCr && text[0] === "\n") text = text.slice(1);
    afterCr = text.endsWith("\r");
    const lines = (rest + text).split(/\r\n|\n|\r/);
    rest = lines.pop() ?? "";
    return lines.flatMap((line) => fields.take(line) ?? []);
  };
}

/** The lines of one event, until the blank one. */
class Fields {
  #event = "";
  /** @type {string | null} */
  #id = null;
  /** @type {string[]} */
  #data = [];

  /** @param {string} line @returns {Frame | null} */
  take(line) {
    if (line === "") return this.#dispatch();
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line) ?? ["", line, ""];
    if (name === "" && value) return { kind: "comment", text: value };
    if (name === "retry" && /^\d+$/.test(value)) return { kind: "retry", ms: Number(value) };
    if (name === "event") this.#event = value;
    if (name === "data") this.#data.push(value);
    if (name === "id" && !value.includes("\0")) this.#id = value;
    return null;
  }

  #dispatch() {
    const [id, event, data] = [this.#id, this.#event || "message", this.#data];
    [this.#id, this.#event, this.#data] = [null, "", []];
    if (data.length === 0) return null;
    return /** @type {const} */ ({ kind: "event", id, event, data: data.join("\n") });
  }
}
