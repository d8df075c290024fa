-- Renews leases that are still held, and keeps their streams from expiring.
-- KEYS: leases
-- ARGV: lease_ms, open_ms, log key pattern, state key pattern, job key pattern, then id, owner, …
-- Returns per pair 'held', 'cancel' (held, and a cancel is asked for) or 'lost'
local leases = KEYS[1]
local lease_ms, open_ms, log_of, state_of, job_of = unpack(ARGV, 1, 5)
local now = now_ms()
local verdicts = {}

for i = 6, #ARGV, 2 do
  local id, owner = ARGV[i], ARGV[i + 1]
  local state = string.format(state_of, id)
  local s = redis.call('HMGET', state, 'owner', 'ended', 'cancel')
  if s[1] ~= owner or s[2] then
    verdicts[#verdicts + 1] = 'lost'
  else
    -- Before the lease: a full memory must not cost the worker its jobs.
    keep(id, open_ms, string.format(log_of, id), state, string.format(job_of, id))
    redis.call('ZADD', leases, now + lease_ms, id)
    verdicts[#verdicts + 1] = s[3] and 'cancel' or 'held'
  end
end
return verdicts
