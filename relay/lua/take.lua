-- Takes webhooks that are due. Each comes again when its lease ends, unless it is settled by then.
-- KEYS: webhooks
-- ARGV: how many, lease_ms, log and state key pattern
-- Returns {id, url, number of this try, left_ms, ended_ms, kind and data of the terminal event}
-- for each; left_ms is how long the stream will still be there
local webhooks = KEYS[1]
local want, lease_ms, log_of, state_of = unpack(ARGV)
local now = now_ms()
local taken = {}

for _, id in ipairs(redis.call('ZRANGEBYSCORE', webhooks, '-inf', now, 'LIMIT', 0, want)) do
  redis.call('ZREM', webhooks, id) -- a full memory must not stop what frees some
  local state = string.format(state_of, id)
  local s = redis.call('HMGET', state, 'webhook', 'ended_ms')
  local last = redis.call('XREVRANGE', string.format(log_of, id), '+', '-', 'COUNT', 1)[1]
  -- With an expired stream nothing is left to tell of.
  if s[1] and last then
    redis.call('ZADD', webhooks, now + lease_ms, id)
    local try = redis.call('HINCRBY', state, 'webhook_tries', 1)
    local left_ms = redis.call('PTTL', state)
    taken[#taken + 1] = { id, s[1], try, left_ms, s[2], unpack(last[2]) }
  end
end
return taken
