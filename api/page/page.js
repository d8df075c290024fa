// One page, one answer. The stream's id stands in the address, so a reload or a second window
// watches the same stream; the log on the server is the only memory.

const RETRY_MS = 2000;
const ENDINGS = {
  stop: "Complete.",
  length: "Cut off: the answer reached its limit of length.",
  content_filter: "Cut off by the content filter of the model service.",
};

const [form, question, send, problem, stream, status, link, cancel, answer] = [
  "ask", "question", "send", "problem", "stream", "status", "link", "cancel", "answer",
].map((id) => document.getElementById(id));

// The EventSource of the stream in the address. Whatever was begun for an earlier one ends itself.
let source = null;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  // Enter submits whether the button is disabled or not.
  if (send.disabled) return;
  send.disabled = true;
  problem.textContent = "";
  try {
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
  const mine = source;
  problem.textContent = "";
  try {
    await call("POST", `streams/${location.hash.slice(1)}/cancel`);
  } catch (error) {
    if (mine === source) problem.textContent = error.message;
  }
});

addEventListener("hashchange", watch);
watch();

function watch() {
  source?.close();
  source = null;
  answer.textContent = problem.textContent = "";
  const id = location.hash.slice(1);
  link.hidden = cancel.hidden = !id;
  link.href = location.href;
  // Anything else, such as "..", would lead to another path than a stream's.
  if (id && !/^\w+$/.test(id)) refuse("There is no stream with this id.");
  else if (id) follow(id);
  else say("");
}

function follow(id) {
  const mine = (source = new EventSource(`streams/${id}/events`));
  const on = (kind, act) => mine.addEventListener(kind, ({ data }) => act(JSON.parse(data)));
  const end = (text, state) => {
    mine.close();
    if (document.activeElement === cancel) question.focus();
    cancel.hidden = true;
    say(text, state);
  };
  let doing = "Connecting …";
  say(doing, "live");
  mine.onopen = () => say(doing, "live");
  mine.onerror = () => lost(mine, id);
  on("queued", () => say((doing = "Waiting for a worker …"), "live"));
  on("started", ({ model, attempt }) => {
    // The one rule: clear what you have.
    answer.textContent = "";
    doing = attempt > 1 ? `${model} answers afresh, attempt ${attempt} …` : `${model} answers …`;
    say(doing, "live");
  });
  on("chunk", ({ text, choices }) => grow(text ?? choices?.[0]?.delta?.refusal ?? ""));
  on("completed", ({ finish_reason }) =>
    end(ENDINGS[finish_reason] ?? `Complete: ${finish_reason}.`, "ended"));
  on("failed", ({ message }) => end(message, "failed"));
  on("cancelled", () => end("Stopped. This is how far it came.", "ended"));
}

async function lost(mine, id) {
  say("Connection lost, coming back …", "live");
  if (mine.readyState === EventSource.CONNECTING) return;
  // Any status but 200 ends an EventSource for good, and it does not say which status it was.
  const error = await call("GET", `streams/${id}`).then(() => null, (reason) => reason);
  if (mine !== source) return;
  if (error?.status >= 400 && error.status < 500 && error.status !== 429) refuse(error.message);
  else setTimeout(() => mine === source && follow(id), RETRY_MS);
}

function refuse(text) {
  link.hidden = cancel.hidden = true;
  say(text, "failed");
}

function grow(text) {
  // One text node: the halves of an emoji may come in two chunks, and two nodes would not join them.
  if (answer.firstChild) answer.firstChild.appendData(text);
  else answer.textContent = text;
}

function say(text, state) {
  status.textContent = text;
  if (state) stream.dataset.state = state;
  else delete stream.dataset.state;
}

async function call(method, path, body) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) })
    .catch(() => { throw new Error("The server cannot be reached: try again."); });
  // A proxy in between answers with no problem of ours, and perhaps with no JSON.
  const value = await response.json().catch(() => ({}));
  if (response.ok) return value;
  const text = value.detail ?? `The server answered ${response.status}: try again.`;
  throw Object.assign(new Error(text), { status: response.status });
}
