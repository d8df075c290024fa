// A chat server as the README of resumable-stream has it: the process that asks the model serves
// the first viewer itself, and others follow over Redis.
//
// node server.mjs PORT UPSTREAM REDIS_SOCKET

import { randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { createClient } from 'redis';
import { createResumableStreamContext } from 'resumable-stream';

const [port, upstream, path] = process.argv.slice(2);
const [publisher, subscriber] = [0, 1].map(() => createClient({ socket: { path } }));
await Promise.all([publisher.connect(), subscriber.connect()]);
const context = createResumableStreamContext({ waitUntil: null, publisher, subscriber });

async function ask(messages) {
  const response = await fetch(`${upstream}/openai/deployments/demo/chat/completions?api-version=1`, {
    method: 'POST',
    headers: { 'api-key': 'k', 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'demo', messages, stream: true, temperature: 0, max_tokens: 800 }),
  });
  let rest = '';
  return response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new TransformStream({
    transform(piece, controller) {
      const events = (rest + piece).split('\n\n');
      rest = events.pop();
      for (const event of events) {
        if (event === 'data: [DONE]') continue;
        const text = JSON.parse(event.slice(6)).choices[0]?.delta.content;
        if (text) controller.enqueue(`data: ${JSON.stringify({ text })}\n\n`);
      }
    },
  }));
}

async function pass(stream, response) {
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  for await (const piece of stream) response.write(piece);
  response.end();
}

async function body(request) {
  let text = '';
  for await (const piece of request) text += piece;
  return JSON.parse(text);
}

async function serve(request, response) {
  if (request.method === 'POST') {
    const id = randomUUID();
    const { messages } = await body(request);
    const answer = await ask(messages);
    const stream = await context.createNewResumableStream(id, () => answer);
    if (request.url === '/chat') return pass(stream, response);
    response.writeHead(202).end(JSON.stringify({ events_url: `/streams/${id}` }));
    for await (const _ of stream);
  } else {
    const stream = await context.resumeExistingStream(request.url.split('/').pop());
    await (stream ? pass(stream, response) : response.writeHead(404).end());
  }
}

createServer((request, response) => {
  serve(request, response).catch((error) => { console.error(error); response.destroy(); });
}).listen(port, '127.0.0.1');
