// One page, one answer. The stream's id stands in the address, so a reload or a second window
// watches the same stream; the log on the server is the only memory.

import { Refused, inWords, watch } from "./relay.js";

const ENDINGS = {
  stop: "Complete.",
  length: "Cut off: the answer reached its limit of length.",
  content_filter: "Cut off by the content filter of the model service.",
};

const [form, question, send, problem, stream, status, link, cancel, answer] = [
  "ask", "question", "send", "problem", "stream", "status", "link", "cancel", "answer",
].map((id) => document.getElementById(id));

const PATIENCE_MS = 10_000;

// Ends the watching of the stream in the address, and tells which one something was begun for.
let watching = new AbortController();
// What has come and is not shown yet: each piece by itself, a very long answer would freeze the page.
let fresh = "";

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  // Enter submits whether the button is disabled or not.
  if (send.disabled) return;
  send.disabled = true;
  problem.textContent = "";
  try {
    // A question of blanks alone passes for one that is filled in.
    if (!question.value.trim()) throw new Error("Type a question first.");
    const messages = [{ role: "user", content: question.value }];
    const { stream_id } = await call("POST", "chat", { messages });
    location.hash = stream_id;
  } catch (error) {
    problem.textContent = error.message;
  } finally {
    send.disabled = false;
  }
});

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

cancel.addEventListener("click", async () => {
  const mine = watching;
  problem.textContent = "";
  try {
    await call("POST", `streams/${location.hash.slice(1)}/cancel`);
  } catch (error) {
    if (mine === watching) problem.textContent = error.message;
  }
});

addEventListener("hashchange", show);
show();
send.disabled = false; // Without this script it would reload the page, and the question be lost.

function show() {
  watching.abort();
  watching = new AbortController();
  clear();
  problem.textContent = "";
  const id = location.hash.slice(1);
  link.hidden = cancel.hidden = !id;
  link.href = location.href;
  // Anything else, such as "..", would lead to another path than a stream's.
  if (id && !/^\w+$/.test(id)) refuse("There is no stream with this id: check it.");
  else if (id) follow(id, watching.signal);
  else say("");
}

function follow(id, signal) {
  let doing = "Connecting …";
  const now = (text) => say((doing = text), "live");
  now(doing);
  watch(`streams/${id}/events`, {
    signal,
    onText: grow,
    onReset: clear,
    onOpen: () => {
      problem.textContent = ""; // That the server could not be reached is no longer so.
      say(doing, "live");
    },
    onLost: () => say("Connection lost, coming back …", "live"),
    onComment: (text) => say(`${text} …`, "live"),
    onEvent: ({ event, data }) => {
      if (event === "queued") now("Waiting for a worker …");
      else if (event === "started") now(answering(data));
      else if (event === "chunk") {
        const refusal = data.choices?.[0]?.delta?.refusal;
        if (refusal) grow(refusal);
        // What a comment said is being waited for has come. Said once: a screen reader reads it out.
        if (status.textContent !== doing) say(doing, "live");
      }
    },
    onDone: end,
  }).catch((error) => {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) throw error;
    refuse(error.message);
  });
}

function answering({ model, attempt }) {
  return attempt > 1 ? `${model} answers afresh, attempt ${attempt} …` : `${model} answers …`;
}

function end({ kind, finish_reason, message }) {
  write();
  if (kind === "gone") return refuse(message);
  if (document.activeElement === cancel) question.focus();
  cancel.hidden = true;
  if (kind === "completed") say(ENDINGS[finish_reason] ?? `Complete: ${finish_reason}.`, "ended");
  else if (kind === "cancelled") say("Stopped. This is how far it came.", "ended");
  else say(message ?? "The answer arrived damaged: reload to try again.", "failed");
}

function refuse(text) {
  link.hidden = cancel.hidden = true;
  say(text, "failed");
}

function grow(text) {
  if (!fresh) setTimeout(write, 16);
  fresh += text;
}

function write() {
  // One text node: the halves of an emoji may come in two chunks, and two nodes would not join them.
  if (answer.firstChild) answer.firstChild.appendData(fresh);
  else answer.textContent = fresh;
  fresh = "";
}

function clear() {
  answer.textContent = fresh = "";
}

function say(text, state) {
  status.textContent = text;
  if (state) stream.dataset.state = state;
  else delete stream.dataset.state;
}

async function call(method, path, body) {
  const headers = { "content-type": "application/json" };
  // A browser has six connections to a server over HTTP/1.1, and each window that watches takes one:
  // with six of them this would wait until an answer ends, without a word.
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) })
    .catch(({ name }) => {
      throw new Error(name === "TimeoutError"
        ? "The server does not answer: close other windows that watch an answer, or try again."
        : "The server cannot be reached: try again.");
    });
  // A proxy in between answers with no problem of ours, and perhaps with no JSON.
  const value = await response.json().catch(() => ({}));
  if (response.ok) return value;
  throw new Error(value.detail ?? inWords(response.status));
}
