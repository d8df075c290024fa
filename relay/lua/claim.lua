-- Takes jobs off the queue: the attempt number and the lease come in one atom.
-- KEYS: queue, leases
-- ARGV: owner, how many, lease_ms, state key pattern, job key pattern
-- Returns {id, attempt, tries, cancel asked (0|1), request, job} for each claim
local queue, leases = unpack(KEYS)
local owner, want, lease_ms, state_of, job_of = unpack(ARGV)
local now = now_ms()
local claims = {}

while #claims < tonumber(want) do
  local id = redis.call('ZPOPMIN', queue)[1]
  if not id then break end
  local state, job = string.format(state_of, id), string.format(job_of, id)
  local s = redis.call('HMGET', state, 'request', 'ended', 'cancel')
  local job_data = redis.call('GET', job)
  -- An expired, erased or ended stream may still stand in the queue: nobody waits for it.
  if s[1] and not s[2] and job_data then
    local attempt = redis.call('HINCRBY', state, 'attempt', 1)
    local tries = redis.call('HINCRBY', state, 'tries', 1)
    redis.call('HSET', state, 'owner', owner, 'next', 0)
    redis.call('ZADD', leases, now + lease_ms, id)
    claims[#claims + 1] = { id, attempt, tries, s[3] and 1 or 0, s[1], job_data }
  end
end
return claims
