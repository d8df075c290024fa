-- Erased means erased: nothing with this id remains.
-- KEYS: log, state, viewers, leases, job, queue, webhooks
-- ARGV: id, control channel
-- Returns 1, or 0 if nothing was there
local log, state, viewers, leases, job, queue, webhooks = unpack(KEYS)
local id, control = unpack(ARGV)

-- Its Idempotency-Key and its chat may lead to a younger stream by now.
local idempotency, chat = unpack(redis.call('HMGET', state, 'idempotency', 'chat'))
if idempotency and redis.call('HGET', idempotency, 'id') == id then redis.call('DEL', idempotency) end
if chat and redis.call('GET', chat) == id then redis.call('DEL', chat) end
local there = redis.call('DEL', log, state)
redis.call('DEL', viewers, job)
redis.call('ZREM', leases, id)
redis.call('ZREM', queue, id)
redis.call('ZREM', webhooks, id)
tell(control, 'erase ' .. id)
return there > 0 and 1 or 0
