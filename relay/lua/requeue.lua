-- Puts jobs back into the queue: one that its owner hands over, or all whose lease has lapsed.
-- KEYS: queue, leases, wake
-- ARGV: state key pattern, wake limit, then id and owner of the one handed over, or nothing
-- Returns the ids put back
local queue, leases, wake = unpack(KEYS)
local state_of, room, handed_id, handed_owner = unpack(ARGV)
local ids = { handed_id }
if not handed_id then ids = redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms(), 'LIMIT', 0, 100) end

local back = {}
for _, id in ipairs(ids) do
  local state = string.format(state_of, id)
  local s = redis.call('HMGET', state, 'created_ms', 'ended', 'owner')
  if not handed_id or s[3] == handed_owner then
    redis.call('ZREM', leases, id)
    if s[1] and not s[2] then
      redis.call('HDEL', state, 'owner')
      -- A hand-over is no failure of the attempt, so it does not count as a try.
      if handed_id then redis.call('HINCRBY', state, 'tries', -1) end
      enqueue(queue, wake, id, s[1], room)
      back[#back + 1] = id
    end
  end
end
return back
