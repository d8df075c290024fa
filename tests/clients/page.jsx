// A page as the AI SDK's tutorials have it: useChat with its default transport, messages that are
// kept where the page finds them again, and a button that stops the answer where it is made.

import { StrictMode, useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { useChat } from '@ai-sdk/react';
import { DefaultChatTransport } from 'ai';

const id = location.hash;
const relay = location.search.slice(1); // If it is of another origin.
const transport = relay ? new DefaultChatTransport({ api: `${relay}/api/chat` }) : undefined;
const stopAnswer = () =>
  fetch(`${relay}/api/chat/${encodeURIComponent(id)}/stop`, { method: 'POST' });

function Chat() {
  const [finish, setFinish] = useState();
  const { messages, status, error, sendMessage } = useChat({
    id,
    transport,
    messages: JSON.parse(localStorage.getItem(id) ?? '[]'),
    resume: true,
    onFinish: ({ isAbort, finishReason }) => setFinish(isAbort ? null : finishReason ?? 'stopped'),
  });
  useEffect(() => localStorage.setItem(id, JSON.stringify(messages)), [messages]);
  const send = event => {
    event.preventDefault();
    sendMessage({ text: event.target.question.value });
  };
  return <>
    {messages.map(({ id, role, parts }) => (
      <article key={id} className={role}>
        {parts.map((part, index) => <Part key={index} {...part} />)}
      </article>
    ))}
    <p role="status">{status === 'ready' ? finish : status}</p>
    <p role="alert">{error?.message}</p>
    <form onSubmit={send}><input name="question" aria-label="Your question" /></form>
    <button onClick={stopAnswer}>Stop</button>
  </>;
}

function Part({ type, text, input, state }) {
  if (type === 'text') return <p>{text}</p>;
  if (type === 'reasoning') return <details open>{text}</details>;
  return input !== undefined && <code title={`${type} ${state}`}>{JSON.stringify(input)}</code>;
}

createRoot(document.body).render(<StrictMode><Chat /></StrictMode>);
