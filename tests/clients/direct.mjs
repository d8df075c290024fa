// What the AI SDK's own tutorials put between useChat and an upstream, without chat-relay: it says
// the port that it answers on.
//
// node direct.mjs UPSTREAM

import { createServer } from 'node:http';
import { json } from 'node:stream/consumers';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { convertToModelMessages, jsonSchema, streamText, tool } from 'ai';

const [baseURL] = process.argv.slice(2);
const model = createOpenAICompatible({ name: 'upstream', baseURL, apiKey: 'k' })('demo');
const lookup = tool({ inputSchema: jsonSchema({ type: 'object' }) });
const tools = { lookup, other: lookup };

const server = createServer(async (request, response) => {
  const { messages } = await json(request);
  streamText({ model, tools, messages: await convertToModelMessages(messages) })
    .pipeUIMessageStreamToResponse(response);
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
