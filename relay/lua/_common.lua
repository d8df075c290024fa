-- Stands in front of every script. Key names come from keys.py: `%s` is the stream id.

local function now_exact_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

local function now_ms()
  return math.floor(now_exact_ms())
end

local function keep(ttl_ms, ...)
  for _, key in ipairs({ ... }) do redis.call('PEXPIRE', key, ttl_ms) end
end

-- One atom: entries with explicit ids, their publication, and their place noted in the state.
-- `entries` alternates kind and data. NOMKSTREAM: an erased log stays erased.
local function append(log, state, channel, attempt, first, entries)
  local lines = { attempt .. '-' .. first }
  for i = 1, #entries, 2 do
    local id = attempt .. '-' .. (first + (i - 1) / 2)
    redis.call('XADD', log, 'NOMKSTREAM', id, entries[i], entries[i + 1])
    lines[#lines + 1] = entries[i] .. ' ' .. entries[i + 1]
  end
  redis.call('HSET', state, 'next', first + #entries / 2)
  redis.call('PUBLISH', channel, table.concat(lines, '\n'))
end

-- Closure is data: noted with the last append, and everything that is no longer needed goes.
local function close(id, state, leases, job, kind)
  redis.call('HSET', state, 'ended', kind, 'ended_ms', now_ms())
  -- The owner stays: it may ask once more whether its last append stands.
  redis.call('HDEL', state, 'request', 'cancel')
  redis.call('ZREM', leases, id)
  redis.call('DEL', job)
end

local function enqueue(queue, wake, id, score, room)
  redis.call('ZADD', queue, score, id)
  redis.call('RPUSH', wake, '1')
  redis.call('LTRIM', wake, -room, -1)
end
