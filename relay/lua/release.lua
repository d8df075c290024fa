-- Lets go of claims: of what an owner hands over, or of all whose lease has lapsed. Their jobs go back
-- into the queue; what nobody will finish is ended here.
-- KEYS: queue, leases, wake, sweep mark, webhooks, ended, workers
-- ARGV: log, state, channel and job key pattern, wake limit, retention_ms, lease_ms, max tries,
--       data of `failed`, worker that calls, then nothing, or an owner and the id that it hands over,
--       '' for all it has
-- Returns {id, kind, owner} for each stream let go; kind is that of its terminal event, '' if it waits
local queue, leases, wake, mark, webhooks, ended, workers = unpack(KEYS)
local log_of, state_of, channel_of, job_of, room, retention_ms, lease_ms, max_tries, interrupted,
  worker, owner, handed_id = unpack(ARGV)
local now = now_ms()

-- Each sweep is a sign of life.
local function sign()
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', now - 60000)) do
    redis.call('ZREM', workers, gone)
  end
  redis.call('ZADD', workers, now, worker)
end

-- The time in which nobody swept does not count: Redis was away, and nobody could renew either. (Or
-- its clock was set, and no lease means anything.) Whoever lives now has one more lease to say so, and
-- no more than one: that lease ends on half a millisecond, which tells it from those of the living.
local function sweepable()
  local last = tonumber(redis.call('GET', mark) or now)
  redis.call('DEL', mark)
  redis.call('SET', mark, now)
  sign()
  if math.abs(now - last) > lease_ms / 2 then
    local held = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
    for i = 1, #held, 2 do
      if tonumber(held[i + 1]) % 1 == 0 then
        redis.call('ZADD', leases, now + lease_ms + 0.5, held[i])
      end
    end
  end
  return redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 100)
end

local function release(id)
  local state = string.format(state_of, id)
  local s = redis.call('HMGET', state, 'created_ms', 'ended', 'cancel', 'recovery', 'next', 'tries',
    'owner')
  local created_ms, has_ended, cancel, recovery = unpack(s, 1, 4)
  redis.call('ZREM', leases, id)
  if not created_ms or has_ended then return nil end
  redis.call('HDEL', state, 'owner')
  local begun, tries = tonumber(s[5]) > 0, tonumber(s[6])
  -- A hand-over is no failure of the attempt, so it does not count as a try.
  if owner then tries = redis.call('HINCRBY', state, 'tries', -1) end

  local kind, data
  if cancel then
    kind, data = 'cancelled', '{}'
  elseif tries >= tonumber(max_tries) or (recovery == 'fail' and begun) then
    kind, data = 'failed', interrupted
  else
    enqueue(queue, wake, id, created_ms, room)
    return { id, '', s[7] or '' }
  end
  close_unowned(id, string.format(log_of, id), state, string.format(channel_of, id), leases,
    string.format(job_of, id), webhooks, ended, retention_ms, kind, data)
  return { id, kind, s[7] or '' }
end

local function handed()
  local ids = handed_id ~= '' and { handed_id } or redis.call('ZRANGE', leases, 0, -1)
  local its = {}
  for _, id in ipairs(ids) do
    if redis.call('HGET', string.format(state_of, id), 'owner') == owner then its[#its + 1] = id end
  end
  return its
end

-- Nothing expires in the outbox, and where no worker may deliver any more none takes from it.
local function drop_expired()
  for _, id in ipairs(redis.call('ZRANGE', webhooks, 0, 9)) do
    if redis.call('EXISTS', string.format(state_of, id)) == 0 then redis.call('ZREM', webhooks, id) end
  end
end

if not owner then drop_expired() end
local released = {}
for _, id in ipairs(owner and handed() or sweepable()) do released[#released + 1] = release(id) end
return released
