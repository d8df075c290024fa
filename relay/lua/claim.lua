-- Takes jobs off the queue: the attempt number and the lease come in one atom. Until the first renewal
-- nothing else keeps their streams from expiring.
-- KEYS: queue, leases, wake
-- ARGV: owner, how many, bytes of requests after which no more, lease_ms, open_ms, log, state and
--       job key pattern
-- Returns {id, attempt, ordinal, request, job} for each claim
local queue, leases, wake = unpack(KEYS)
local owner, want, most_bytes, lease_ms, open_ms, log_of, state_of, job_of = unpack(ARGV)
local now = now_ms()
local claims, bytes = {}, 0

while #claims < tonumber(want) and bytes < tonumber(most_bytes) do
  local id = redis.call('ZPOPMIN', queue)[1]
  if not id then
    -- Each token that is left would wake somebody for nothing.
    redis.call('DEL', wake)
    break
  end
  local state, job = string.format(state_of, id), string.format(job_of, id)
  local request, job_data = redis.call('HGET', state, 'request'), redis.call('GET', job)
  -- An expired, erased or ended stream may still stand in the queue: nobody waits for it.
  if request and job_data then
    local attempt = next_attempt(state)
    redis.call('HSET', state, 'owner', owner, 'attempt', attempt, 'next', 0)
    local ordinal = redis.call('HINCRBY', state, 'claims', 1)
    redis.call('HINCRBY', state, 'tries', 1)
    redis.call('ZADD', leases, now + lease_ms, id)
    keep(id, open_ms, string.format(log_of, id), state, job)
    bytes = bytes + #request
    claims[#claims + 1] = { id, attempt, ordinal, request, job_data }
  end
end
return claims
