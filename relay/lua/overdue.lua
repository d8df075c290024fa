-- Ends what nobody took in time: its keys have no longer to live than those of an ended stream.
-- KEYS: queue, leases, webhooks, ended
-- ARGV: log, state, channel and job key pattern, open_ms, retention_ms, data of `failed`
-- Returns the ids of the streams that it ended
local queue, leases, webhooks, ended = unpack(KEYS)
local log_of, state_of, channel_of, job_of, open_ms, retention_ms, data = unpack(ARGV)
local ids = {}

-- Those that were claimed meanwhile stand at their old place: their age alone does not tell.
local born = now_ms() - (open_ms - retention_ms)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', born, 'LIMIT', 0, 100)) do
  local state = string.format(state_of, id)
  if redis.call('PTTL', state) <= tonumber(retention_ms) then
    redis.call('ZREM', queue, id)
    local s = redis.call('HMGET', state, 'created_ms', 'ended')
    -- What has expired or ended may still stand in the queue.
    if s[1] and not s[2] then
      close_unowned(id, string.format(log_of, id), state, string.format(channel_of, id), leases,
        string.format(job_of, id), webhooks, ended, retention_ms, 'failed', data)
      ids[#ids + 1] = id
    end
  end
end
return ids
