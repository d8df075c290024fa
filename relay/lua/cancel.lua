-- Ends a stream that nobody has claimed; marks one that somebody has, and tells the workers.
-- KEYS: log, state, channel, leases, job, queue, webhooks, ended
-- ARGV: id, retention_ms, control channel
-- Returns false (gone), the kind of terminal event that stands, or 'cancelling'
local log, state, channel, leases, job, queue, webhooks, ended = unpack(KEYS)
local id, retention_ms, control = unpack(ARGV)

local s = redis.call('HMGET', state, 'attempt', 'ended')
if not s[1] or redis.call('EXISTS', log) == 0 then return false end
if s[2] then return s[2] end
if redis.call('ZSCORE', leases, id) then
  redis.call('HDEL', state, 'cancel') -- a full memory must not stop what frees some
  redis.call('HSET', state, 'cancel', 1)
  tell(control, 'cancel ' .. id)
  return 'cancelling'
end
redis.call('ZREM', queue, id)
close_unowned(id, log, state, channel, leases, job, webhooks, ended, retention_ms, 'cancelled', '{}')
return 'cancelled'
