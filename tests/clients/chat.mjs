// The Chat behind useChat, driven by lines of JSON: {"do": name, "with": value}. It writes a line
// with all that a page would show whenever that changes, and when a command is done.
//
// node chat.mjs URL CHAT_ID

import { createInterface } from 'node:readline';
import { Chat } from '@ai-sdk/react';
import { DefaultChatTransport } from 'ai';

let [base, id] = process.argv.slice(2);
const called = [];

const transport = new DefaultChatTransport({ fetch: (path, init) => fetch(base + path, init) });
const onToolCall = ({ toolCall }) => { called.push(toolCall); };
let finished;
const onFinish = ({ isAbort, isDisconnect, isError, finishReason }) => {
  finished = { isAbort, isDisconnect, isError, finishReason };
};
const chat = new Chat({ id, transport, onToolCall, onFinish });

function report(done) {
  const { status, error, messages } = chat;
  console.log(JSON.stringify({ status, error: error?.message, messages, called, finished, done }));
}
for (const kind of ['Messages', 'Status', 'Error']) {
  chat[`~register${kind}Callback`](() => report());
}

const commands = {
  send: text => chat.sendMessage({ text }),
  go_on: () => chat.sendMessage(),
  regenerate: () => chat.regenerate(),
  resume: () => chat.resumeStream(),
  stop: () => chat.stop(),
  tool_output: output => chat.addToolOutput(output),
  show: messages => { chat.messages = messages; },
  move: url => { base = url; },
};
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  Promise.resolve(commands[command.do](command.with)).then(() => report(command.do));
}
