-- Ends what nobody took in time: its keys have no longer to live than those of an ended stream.
-- KEYS: queue, leases, webhooks, ended
-- ARGV: log, state, channel and job key pattern, open_ms, retention_ms, data of `failed`
-- Returns the ids of the streams that it ended
local queue, leases, webhooks, ended = unpack(KEYS)
local log_of, state_of, channel_of, job_of, open_ms, retention_ms, data = unpack(ARGV)
local ids = {}

local function finish(id, state)
  redis.call('ZREM', queue, id)
  local s = redis.call('HMGET', state, 'created_ms', 'ended')
  -- What has expired or ended may still stand in the queue.
  if not s[1] or s[2] then return end
  close_unowned(id, string.format(log_of, id), state, string.format(channel_of, id), leases,
    string.format(job_of, id), webhooks, ended, retention_ms, 'failed', data)
  ids[#ids + 1] = id
end

-- Those that were claimed meanwhile stand at their old place: their age alone does not tell, and they
-- must not hide those behind them. For any number of either there is no time in one call.
local born = now_ms() - (open_ms - retention_ms)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', born, 'LIMIT', 0, 10000)) do
  local state = string.format(state_of, id)
  if redis.call('PTTL', state) <= tonumber(retention_ms) then finish(id, state) end
  if #ids == 100 then break end
end
return ids
