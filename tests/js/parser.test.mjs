import assert from "node:assert/strict";
import { test } from "node:test";

import { parser } from "./relay.mjs";

const bytes = (text) => new TextEncoder().encode(text);
const parse = (...pieces) => pieces.flatMap(parser());
const event = (data, { id = null, name = "message" } = {}) => ({ kind: "event", id, event: name, data });

const SAMPLE = "\uFEFFretry: 1500\r\n\r\n: Redis is away\n\n:\n\nid: 1-0\revent: started\rdata: {}\r\r"
  + 'id: 1-1\r\nevent: chunk\r\ndata: {"text":"é😀\u2028"}\r\n\r\n'
  + "event: failed\ndata: one\ndata: two\n\nid: 1-9\ndata: never finished\n";
const FRAMES = [
  { kind: "retry", ms: 1500 },
  { kind: "comment", text: "Redis is away" },
  event("{}", { id: "1-0", name: "started" }),
  event('{"text":"é😀\u2028"}', { id: "1-1", name: "chunk" }),
  event("one\ntwo", { name: "failed" }),
];

test("wherever a stream is cut, its frames are the same", () => {
  const whole = bytes(SAMPLE);
  for (let cut = 0; cut <= whole.length; cut++) {
    assert.deepEqual(parse(whole.slice(0, cut), whole.slice(cut)), FRAMES, `cut at ${cut}`);
  }
});

test("bytes that come one by one make the same frames", () => {
  const single = Array.from(bytes(SAMPLE), (byte) => Uint8Array.of(byte));
  assert.deepEqual(parse(...single), FRAMES);
});

test("an event ends at its blank line, not with the LF of the last CRLF", () => {
  const parseNext = parser();
  assert.deepEqual(parseNext(bytes("data: a\r\n\r")), [event("a")]);
  assert.deepEqual(parseNext(bytes("\ndata: b\r\n\r\n")), [event("b")]);
});

for (const [what, text, frames] of [
  ["a field without a space", "data:a\n\n", [event("a")]],
  ["one space is taken, not two", "data:  a\n\n", [event(" a")]],
  ["a value with colons", "data: a: b\n\n", [event("a: b")]],
  ["a field without a colon", "data\n\n", [event("")]],
  ["an unknown field", "what: x\ndata: a\n\n", [event("a")]],
  ["no data, no event", "id: 1-1\nevent: chunk\n\ndata: a\n\n", [event("a")]],
  ["an id with NUL is none", "id: 1\0\ndata: a\n\n", [event("a")]],
  ["a name does not outlive its event", "event: x\ndata: a\n\ndata: b\n\n",
    [event("a", { name: "x" }), event("b")]],
  ["nor does an id, here", "id: 1-1\ndata: a\n\ndata: b\n\n", [event("a", { id: "1-1" }), event("b")]],
  ["a retry that is no number", "retry: 1s\n\n", []],
  ["a heartbeat says nothing", ":\n\n: \n\n", []],
]) {
  test(`of the standard: ${what}`, () => assert.deepEqual(parse(bytes(text)), frames));
}
