-- Stands in front of every script, behind the `bounds_ms` of durations.py. Key names come from
-- keys.py: `%s` is the stream id.
--
-- With its memory full, Redis refuses a script whose first write could grow it, and lets every
-- script finish that has written before. So all but births begin with a write that cannot: only the
-- end of an answer frees what its question takes.

local function now_exact_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

local function now_ms()
  return math.floor(now_exact_ms())
end

-- What leads to the stream stands as long: without its Idempotency-Key the same request would begin
-- another one, and without that of its chat nobody could resume or stop it there.
local function keep(id, ttl_ms, log, state, ...)
  for _, key in ipairs({ log, state, ... }) do redis.call('PEXPIRE', key, ttl_ms) end
  local leads = redis.call('HMGET', state, 'idempotency', 'chat')
  if leads[1] then redis.call('PEXPIRE', leads[1], ttl_ms) end
  -- A younger stream of the chat may have taken its place.
  if leads[2] and redis.call('GET', leads[2]) == id then redis.call('PEXPIRE', leads[2], ttl_ms) end
end

-- The fencing number: above the last, and above the stream's age in hundredths of a second. Redis
-- may forget a claim when it crashes or fails over; without the age the number would be handed out
-- again, and a viewer who has events of the first attempt could not tell them from the second's.
-- The n-th is at most n above the age, so none is repeated if Redis is away for n hundredths.
local function next_attempt(state)
  local s = redis.call('HMGET', state, 'attempt', 'created_ms')
  return math.max(s[1] + 1, math.floor((now_ms() - s[2]) / 10) + 1)
end

-- Whom Redis does not let publish must not fail in the middle of a script, which would leave what it
-- does half done. Who listens finds out by himself, if later.
local function tell(channel, message)
  redis.pcall('PUBLISH', channel, message)
end

-- One atom: entries with explicit ids, their publication, and their place noted in the state.
-- `entries` alternates kind and data. NOMKSTREAM: an erased log stays erased; then it returns false.
local function append(log, state, channel, attempt, first, entries)
  local lines = { attempt .. '-' .. first }
  for i = 1, #entries, 2 do
    local id = attempt .. '-' .. (first + (i - 1) / 2)
    if not redis.call('XADD', log, 'NOMKSTREAM', id, entries[i], entries[i + 1]) then return false end
    lines[#lines + 1] = entries[i] .. ' ' .. entries[i + 1]
  end
  redis.call('HSET', state, 'next', first + #entries / 2)
  tell(channel, table.concat(lines, '\n'))
  return true
end

-- A clock that was set back must not count below nothing.
local function count_ms(ended, what, from, to)
  local ms, bucket = math.max(0, to - from), 'inf'
  for i = #bounds_ms, 1, -1 do
    if ms <= bounds_ms[i] then bucket = bounds_ms[i] end
  end
  redis.call('HINCRBY', ended, what .. ' ' .. bucket, 1)
  redis.call('HINCRBY', ended, what .. ' sum', ms)
end

-- Closure is data: noted with the last append, and everything that is no longer needed goes. That
-- somebody is to be told of it is noted in the same atom.
local function close(id, state, leases, job, webhooks, ended, kind, data)
  local now = now_ms()
  local created_ms, started_ms, webhook =
    unpack(redis.call('HMGET', state, 'created_ms', 'started_ms', 'webhook'))
  redis.call('HSET', state, 'ended', kind, 'ended_ms', now)
  if webhook then redis.call('ZADD', webhooks, now, id) end
  redis.call('HDEL', state, 'request', 'cancel')
  redis.call('ZREM', leases, id)
  redis.call('DEL', job)
  -- Every `failed` begins with its code, of which there are few. No JSON parser: one that refuses what
  -- it is given would leave this half done.
  local code = kind == 'failed' and string.match(data, '^{"code":"([%l_]+)"')
  redis.call('HINCRBY', ended, code and kind .. ' ' .. code or kind, 1)
  if started_ms then count_ms(ended, 'first_chunk', created_ms, started_ms) end
  count_ms(ended, 'answer', created_ms, now)
end

-- The terminal event of a stream that nobody writes. It stands in an attempt of its own: that
-- fences off whoever still believes to own the stream, and reaches viewers who have more of the
-- last attempt than a Redis that lost its tail.
local function close_unowned(id, log, state, channel, leases, job, webhooks, ended, retention_ms,
    kind, data)
  append(log, state, channel, next_attempt(state), 0, { kind, data })
  close(id, state, leases, job, webhooks, ended, kind, data)
  keep(id, retention_ms, log, state)
end

local function enqueue(queue, wake, id, score, room)
  redis.call('ZADD', queue, score, id)
  redis.call('RPUSH', wake, '1')
  redis.call('LTRIM', wake, -room, -1)
end
