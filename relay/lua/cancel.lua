-- Ends a stream that nobody has claimed; marks one that somebody has, and tells the workers.
-- KEYS: log, state, channel, leases, job, queue
-- ARGV: id, retention_ms, control channel
-- Returns false (gone), the kind of terminal event that stands, or 'cancelling'
local log, state, channel, leases, job, queue = unpack(KEYS)
local id, retention_ms, control = unpack(ARGV)

local s = redis.call('HMGET', state, 'attempt', 'next', 'ended')
if not s[1] or redis.call('EXISTS', log) == 0 then return false end
if s[3] then return s[3] end
if redis.call('ZSCORE', leases, id) then
  redis.call('HSET', state, 'cancel', 1)
  redis.call('PUBLISH', control, 'cancel ' .. id)
  return 'cancelling'
end
redis.call('ZREM', queue, id)
append(log, state, channel, s[1], tonumber(s[2]), { 'cancelled', '{}' })
close(id, state, leases, job, 'cancelled')
keep(retention_ms, log, state)
return 'cancelled'
