-- A stream is born, with its job in arq's queue, or nothing happens.
-- KEYS: log, state, channel, job, queue, wake, idempotency, chat
-- ARGV: id, request, job, open_ms, queue_limit, idempotency key or '', body digest, state key pattern,
--       recovery, webhook or '', id of the chat or ''
-- Returns {'created', id, created_ms, subscribers of its channel} | {'repeated', id, created_ms} |
-- {'conflict'} | {'full'}
local log, state, channel, job, queue, wake, idempotency, chat = unpack(KEYS)
local id, request, job_data, open_ms, queue_limit, key, digest, state_of, recovery, webhook, chat_id =
  unpack(ARGV)

if key ~= '' then
  local known = redis.call('HMGET', idempotency, 'id', 'digest')
  -- Redis may have lost the stream alone: then its key leads to a new one.
  local created_ms = known[1] and redis.call('HGET', string.format(state_of, known[1]), 'created_ms')
  if created_ms then
    if known[2] ~= digest then return { 'conflict' } end
    return { 'repeated', known[1], created_ms }
  end
end
if redis.call('ZCARD', queue) >= tonumber(queue_limit) then return { 'full' } end

local now = now_ms()
redis.call('XADD', log, '0-1', 'queued', '{}')
redis.call('HSET', state, 'request', request, 'recovery', recovery, 'created_ms', now, 'attempt', 0,
  'next', 2, 'claims', 0, 'tries', 0)
if webhook ~= '' then redis.call('HSET', state, 'webhook', webhook) end
redis.call('SET', job, job_data, 'PX', open_ms)
if key ~= '' then
  redis.call('HSET', idempotency, 'id', id, 'digest', digest)
  redis.call('HSET', state, 'idempotency', idempotency)
end
if chat_id ~= '' then
  redis.call('SET', chat, id)
  redis.call('HSET', state, 'chat', chat)
end
keep(id, open_ms, log, state)
enqueue(queue, wake, id, now_exact_ms(), queue_limit)
return { 'created', id, now, redis.pcall('PUBSUB', 'NUMSUB', channel)[2] or 0 }
