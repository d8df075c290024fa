// Against servers that say what the real one says only when something is broken.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { getEventListeners, once } from "node:events";
import { createServer } from "node:http";
import { test } from "node:test";

import { Refused, Unreachable, watch } from "./relay.mjs";

const RETRY = "retry: 1\n\n";
const frame = (id, event, data) =>
  `${id ? `id: ${id}\n` : ""}event: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
const started = (attempt = 1) => frame(`${attempt}-0`, "started", { attempt, model: "m" });
const chunk = (id, text) => frame(id, "chunk", { text });
const sha256 = (text) => createHash("sha256").update(text).digest("hex");
const completed = (id, text, chunks, rest) =>
  frame(id, "completed", { finish_reason: "stop", chunks, sha256: sha256(text), ...rest });
const whole = (rest) => RETRY + started() + chunk("1-1", "Hel") + chunk("1-2", "lo")
  + completed("1-3", "Hello", 2, rest);

/** A server that gives its n-th answer to the n-th request, the last one to all after it. An answer
 * is a body, the status of an empty one, or a function of the response. */
async function serving(answers, use) {
  const asked = [];
  const server = createServer((request, response) => {
    const answer = answers[Math.min(asked.length, answers.length - 1)];
    asked.push(request.headers);
    if (typeof answer === "function") return answer(response);
    const status = typeof answer === "number" ? answer : 200;
    response.writeHead(status, { "content-type": "text/event-stream" });
    response.end(status === 200 ? answer : undefined);
  });
  await once(server.listen(0, "127.0.0.1"), "listening");
  try {
    return await use(`http://127.0.0.1:${server.address().port}/streams/x/events`, asked);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

/** Watches to the end; all that was told, and what is then on the screen. */
async function watched(url, options) {
  const told = [];
  let text = "";
  const outcome = await watch(url, {
    onText: (piece) => { told.push(piece); text += piece; },
    onReset: (attempt) => { told.push(["reset", attempt]); text = ""; },
    onDone: ({ kind }) => told.push(["done", kind]),
    ...options,
  });
  return { outcome, text, told };
}

/** An answer of which the connection stays. */
const stay = (body) => (response) => {
  response.writeHead(200, { "content-type": "text/event-stream" });
  response.write(body);
  return response;
};

const resumes = (asked) => asked.map((headers) => headers["last-event-id"]);

/** @param {object} crypto In place of the machine's own. */
async function withCrypto(crypto, use) {
  const own = Object.getOwnPropertyDescriptor(globalThis, "crypto");
  Object.defineProperty(globalThis, "crypto", { value: crypto, configurable: true });
  try {
    return await use();
  } finally {
    Object.defineProperty(globalThis, "crypto", own);
  }
}

test("a whole answer is told once, in order", () =>
  serving([whole()], async (url, asked) => {
    const { outcome, told } = await watched(url);
    assert.deepEqual(told, [["reset", 1], "Hel", "lo", ["done", "completed"]]);
    assert.equal(outcome.finish_reason, "stop");
    assert.equal(asked.length, 1);
  }));

test("headers of the caller go with every request", () =>
  serving([RETRY + started(), whole()], async (url, asked) => {
    await watched(url, { headers: { authorization: "Bearer x" } });
    assert.deepEqual(asked.map(({ authorization }) => authorization), ["Bearer x", "Bearer x"]);
  }));

test("no request may be answered out of a cache", () =>
  serving([RETRY + started(), whole()], async (url) => {
    const caches = [];
    const mine = (path, init) => { caches.push(init.cache); return fetch(path, init); };
    await watched(url, { fetch: mine });
    assert.deepEqual(caches, ["no-store", "no-store"]);
  }));

test("a response that just ends is resumed strictly after its last event", () =>
  serving(
    [RETRY + started() + chunk("1-1", "Hel") + frame(null, "hint", {}) + "id: 1-2\ndata: torn",
      chunk("1-2", "lo") + completed("1-3", "Hello", 2)],
    async (url, asked) => {
      const { text, told } = await watched(url);
      assert.equal(text, "Hello");
      assert.deepEqual(told, [["reset", 1], "Hel", "lo", ["done", "completed"]]);
      assert.deepEqual(resumes(asked), [undefined, "1-1"]);
    },
  ));

for (const [what, rest] of [["hash", { sha256: sha256("Hullo") }], ["count", { chunks: 3 }]]) {
  test(`an answer with another ${what} is cleared and asked for again, from its beginning`, () =>
    serving([stay(whole(rest)), whole()], async (url, asked) => {
      const { outcome, text, told } = await watched(url);
      assert.deepEqual([outcome.kind, text], ["completed", "Hello"]);
      // Cleared at once, not when the server can be reached again.
      assert.deepEqual(told.slice(0, 5), [["reset", 1], "Hel", "lo", ["reset", 1], ["reset", 1]]);
      assert.deepEqual(resumes(asked), [undefined, undefined]);
    }));

  test(`an answer that has another ${what} twice is corrupt`, () =>
    serving([whole(rest)], async (url, asked) => {
      const { outcome, told } = await watched(url);
      assert.equal(outcome.kind, "corrupt");
      assert.deepEqual(told.at(-1), ["done", "corrupt"]);
      assert.equal(told.filter(([what]) => what === "done").length, 1);
      assert.equal(asked.length, 2);
    }));
}

test("without crypto.subtle the count alone is checked", () =>
  withCrypto({}, async () => {
    const wrong = { sha256: sha256("Hullo") };
    await serving([whole(wrong)], async (url) =>
      assert.equal((await watched(url)).outcome.kind, "completed"));
    await serving([whole({ chunks: 3 })], async (url) =>
      assert.equal((await watched(url)).outcome.kind, "corrupt"));
  }));

test("halves of an emoji in two chunks are hashed as one, and a lone one as U+FFFD", () =>
  serving(
    [RETRY + started() + chunk("1-1", "\ud83d") + chunk("1-2", "\ude00") + chunk("1-3", "a\ud83d")
      + completed("1-4", "😀a\uFFFD", 3)],
    async (url, asked) => {
      const { outcome, text } = await watched(url);
      assert.deepEqual([outcome.kind, text], ["completed", "😀a\ud83d"]);
      assert.equal(asked.length, 1);
    },
  ));

test("what was said before a new attempt counts for nothing", () =>
  serving(
    [RETRY + started() + chunk("1-1", "Bye") + started(2) + chunk("2-1", "Hello")
      + completed("2-2", "Hello", 1)],
    async (url) => {
      const { outcome, told } = await watched(url);
      assert.deepEqual(told, [["reset", 1], "Bye", ["reset", 2], "Hello", ["done", "completed"]]);
      assert.equal(outcome.kind, "completed");
    },
  ));

test("204 means: you have it all", () =>
  serving([204], async (url, asked) => {
    const { outcome } = await watched(url, { headers: { "last-event-id": "1-3" } });
    assert.equal(outcome.kind, "ended");
    assert.deepEqual(resumes(asked), ["1-3"]);
  }));

test("an answer whose beginning the caller has is not judged by what is missing here", () =>
  serving([chunk("1-2", "lo") + completed("1-3", "Hello", 2)], async (url, asked) => {
    const { outcome, text } = await watched(url, { headers: { "last-event-id": "1-1" } });
    assert.deepEqual([outcome.kind, text], ["completed", "lo"]);
    assert.equal(asked.length, 1);
  }));

test("a cursor of the caller gives way to a newer one, however its header is written", () =>
  serving([RETRY + chunk("1-2", "lo"), completed("1-3", "Hello", 2)], async (url, asked) => {
    await watched(url, { headers: { "Last-Event-ID": "1-1", Accept: "*/*" } });
    assert.deepEqual(resumes(asked), ["1-1", "1-2"]);
    assert.equal(asked[1].accept, "text/event-stream");
  }));

for (const status of [404, 410]) {
  test(`${status} means gone, with what the problem says`, () => {
    const refuse = (response) => response.writeHead(status, { "content-type": "application/json" })
      .end(JSON.stringify({ code: "stream_gone", detail: "It is gone." }));
    return serving([refuse], async (url, asked) => {
      const { outcome } = await watched(url);
      assert.deepEqual(outcome, { kind: "gone", code: "stream_gone", message: "It is gone." });
      assert.equal(asked.length, 1);
    });
  });
}

test("a failure without an id means gone, one with an id failed", async () => {
  const told = { code: "stream_gone", message: "It is gone." };
  await serving([RETRY + started() + frame(null, "failed", told)], async (url) =>
    assert.deepEqual((await watched(url)).outcome, { kind: "gone", ...told }));
  await serving([RETRY + started() + frame("1-1", "failed", told)], async (url) =>
    assert.deepEqual((await watched(url)).outcome, { kind: "failed", ...told }));
});

for (const [status, mend] of [
  [400, "try again"], [401, "sign in, then reload"], [403, "sign in, then reload"],
]) {
  test(`a refusal by ${status} is thrown, not tried again, and says what would mend it`, () =>
    serving([status], async (url, asked) => {
      const refused = new Refused(status, `The server answered ${status}: ${mend}.`);
      await assert.rejects(watched(url), refused);
      assert.equal(asked.length, 1);
    }));
}

test("what passes by itself, a page of a proxy and a dead connection are tried again", () => {
  const page = (response) => response.writeHead(200, { "content-type": "text/html" }).end("data: <p>\n\n");
  const die = (response) => response.destroy();
  // Whatever brings an event begins the waits anew.
  const those = [408, 429, 500, 502, 503, 504, page, die].flatMap((each) => [each, started()]);
  return serving([RETRY, ...those, whole()], async (url, asked) => {
    const { text } = await watched(url);
    assert.equal(text, "Hello");
    assert.equal(asked.length, 18);
  });
});

test("it gives up after so many connections in a row that brought no event", () =>
  serving([RETRY, 503, started(), 503, 503, 503, whole()], async (url, asked) => {
    await assert.rejects(watched(url, { tries: 3 }), Unreachable);
    assert.equal(asked.length, 6);
  }));

for (const [what, retry, ms] of [["seldomer, the longer the server is away", 200, 800],
  ["in no storm, whatever the server asks for", 0, 400]]) {
  test(`it comes back ${what}`, (context) => {
    context.mock.method(Math, "random", () => 0);
    return serving([`retry: ${retry}\n\n` + started(), 503, 503, whole()], async (url) => {
      let lost;
      await watched(url, { onLost: () => (lost ??= performance.now()) });
      assert.ok(performance.now() - lost > ms - 6);
    });
  });
}

test("its waits grow from a second to five, however long the server is away", async (context) => {
  const waits = [];
  const timer = setTimeout;
  context.mock.method(Math, "random", () => 0);
  context.mock.method(globalThis, "setTimeout", (then, ms) => {
    if (ms < 45_000) waits.push(ms); // The others are for silence.
    return timer(then, ms < 45_000 ? 0 : ms);
  });
  const fetch = async () => new Response(null, { status: 503 });
  await assert.rejects(watched("http://127.0.0.1/", { fetch, tries: 7 }), Unreachable);
  assert.deepEqual(waits, [1000, 2000, 4000, 5000, 5000, 5000]);
});

for (const [what, chance, ms] of [["earlier than the server asked for", 0, 400],
  ["together with everybody else", 1, 600]]) {
  test(`it does not come back ${what}`, (context) => {
    context.mock.method(Math, "random", () => chance);
    return serving(["retry: 400\n\n" + started(), whole()], async (url) => {
      let lost = 0;
      await watched(url, { onLost: () => (lost = performance.now()) });
      // Timers of Node may fire a millisecond early.
      assert.ok(performance.now() - lost > ms - 2);
    });
  });
}

test("a silent connection is dead, one with comments lives", async () => {
  const open = stay(RETRY + started());
  const beat = (response) => {
    const beating = setInterval(() => response.write(":\n\n"), 50);
    setTimeout(() => { clearInterval(beating); response.end(whole().slice(RETRY.length)); }, 900);
  };
  await serving([open, whole()], async (url, asked) => {
    assert.equal((await watched(url, { silenceMs: 100 })).text, "Hello");
    assert.deepEqual(resumes(asked), [undefined, "1-0"]);
  });
  await serving([(response) => beat(open(response))], async (url, asked) => {
    assert.equal((await watched(url, { silenceMs: 500 })).text, "Hello");
    assert.equal(asked.length, 1);
  });
});

for (const [what, answer, silenceMs] of [
  ["a silence", stay(RETRY + started()), Infinity],
  ["a wait to come back", "retry: 9999999999\n\n" + started(), 1000],
]) {
  test(`${what} may be longer than any timer`, () =>
    serving([answer, whole()], async (url, asked) => {
      const signal = AbortSignal.timeout(300);
      await assert.rejects(watched(url, { signal, silenceMs }), { name: "TimeoutError" });
      assert.equal(asked.length, 1);
    }));
}

test("a server that never answers is silent, too", () =>
  serving([RETRY, () => {}, whole()], async (url) =>
    assert.equal((await watched(url, { silenceMs: 100 })).text, "Hello")));

for (const [when, answer, callback] of [
  ["while it listens", stay(RETRY + started()), "onReset"],
  ["while it waits to come back", "retry: 100000\n\n" + started(), "onLost"],
]) {
  test(`its signal ends it ${when}`, () =>
    serving([answer], async (url, asked) => {
      for (const soon of [setImmediate, (now) => now()]) {
        const abort = new AbortController();
        const end = () => soon(() => abort.abort(new Error("enough")));
        await assert.rejects(watch(url, { signal: abort.signal, [callback]: end }), /enough/);
      }
      assert.equal(asked.length, 2);
    }));
}

for (const [what, url, headers] of [
  ["URL", "/streams/x/events"], // Relative to nothing, in Node.
  ["header", "http://127.0.0.1/", { authorization: "Bearer x\ny" }],
]) {
  test(`a ${what} that no request can have is not tried again`, () =>
    assert.rejects(watch(url, { headers, onLost: () => { throw new Error("again"); } }), TypeError));
}

test("a fetch of the caller's may take a URL that no request can have, and lose it", () =>
  serving([whole()], async (url) => {
    let lost = 0;
    const mine = (path, init) => (lost ? fetch(new URL(path, url), init) : Promise.reject(new TypeError()));
    const { text } = await watched("events", { fetch: mine, onLost: () => (lost += 1) });
    assert.deepEqual([text, lost], ["Hello", 1]);
  }));

test("however often it comes back, it leaves nothing behind on its signal", () =>
  serving([RETRY, started(), 503, whole()], async (url) => {
    const { signal } = new AbortController();
    const left = [];
    const onLost = () => left.push(getEventListeners(signal, "abort").length);
    await watched(url, { signal, onLost });
    assert.deepEqual([...left, getEventListeners(signal, "abort").length], [0, 0, 0, 0]);
  }));

test("nothing is asked after its signal", () =>
  serving([whole()], async (url, asked) => {
    await assert.rejects(watch(url, { signal: AbortSignal.abort(new Error("enough")) }), /enough/);
    assert.equal(asked.length, 0);
  }));

const CALLBACKS = ["onOpen", "onComment", "onEvent", "onReset", "onText", "onLost", "onDone"];
for (const [last, before] of [
  ["onOpen", []],
  ["onComment", ["onOpen"]],
  ["onEvent", ["onOpen", "onComment"]],
  ["onReset", ["onOpen", "onComment", "onEvent"]],
  ["onText", ["onOpen", "onComment", "onEvent", "onReset", "onEvent"]],
]) {
  test(`nothing is told after a signal in ${last}, not even what has come already`, () =>
    serving([": wait\n\n" + whole()], async (url) => {
      const abort = new AbortController();
      const told = [];
      const telling = Object.fromEntries(CALLBACKS.map((name) => [name, () => {
        told.push(name);
        if (name === last) abort.abort(new Error("enough"));
      }]));
      await assert.rejects(watch(url, { signal: abort.signal, ...telling }), /enough/);
      assert.deepEqual(told, [...before, last]);
    }));
}

test("nothing is told after a signal that comes while the hash is made", () =>
  serving([whole({ sha256: sha256("Hullo") })], async (url) => {
    const abort = new AbortController();
    const told = [];
    const onEvent = ({ event }) => {
      if (event === "completed") queueMicrotask(() => abort.abort(new Error("enough")));
    };
    const onReset = () => told.push("reset");
    await assert.rejects(watch(url, { signal: abort.signal, onEvent, onReset }), /enough/);
    assert.deepEqual(told, ["reset"]);
  }));

test("what a callback throws comes out and closes the connection", async () => {
  let closed;
  const answer = (response) => (closed = once(stay(started())(response), "close"));
  await serving([answer], async (url) => {
    const onReset = () => { throw new Error("mine"); };
    await assert.rejects(watch(url, { onReset }), /mine/);
    await closed;
  });
});
