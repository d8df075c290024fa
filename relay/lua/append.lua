-- The way of a worker into logs: what several attempts append, each in one atom.
-- ARGV: log, state, channel and job key pattern, leases, webhooks and ended key, retention_ms, then
--       for each attempt its stream, number, owner, first seq, terminal kind or '', number of entries
--       and the kind and data of each
-- Returns {verdict, next seq, cancel asked (0|1)} for each. What already stands is not appended
-- again. If `next` is below `first`, the log lost its tail: nothing was appended, begin again at
-- `next`.
-- verdict: 'ok', 'fenced' (another attempt owns the stream, or Redis forgot this one), 'closed',
-- 'erased', or else the error of Redis
local log_of, state_of, channel_of, job_of, leases, webhooks, ended, retention_ms =
  unpack(ARGV, 1, 8)

local function append_for(at)
  local id, attempt, owner, first, ending, count = unpack(ARGV, at, at + 5)
  first, count = tonumber(first), tonumber(count)
  local log, state = string.format(log_of, id), string.format(state_of, id)

  local s = redis.call('HMGET', state, 'attempt', 'next', 'ended', 'cancel', 'owner')
  if not s[1] then return { 'erased', 0, 0 } end
  -- The owner stays noted on a stream that it closed: it may ask once more whether that stands.
  if s[1] ~= attempt or s[5] ~= owner then return { 'fenced', 0, 0 } end
  local top = tonumber(s[2])
  if s[3] then return { 'closed', top, 0 } end
  local cancel = s[4] and 1 or 0
  if top < first or top >= first + count then return { 'ok', top, cancel } end

  redis.call('HDEL', state, '') -- a full memory must not stop what will free some
  local entries = { unpack(ARGV, at + 6 + 2 * (top - first), at + 5 + 2 * count) }
  if not append(log, state, string.format(channel_of, id), attempt, top, entries) then
    return { 'erased', 0, 0 }
  end
  if entries[1] == 'started' then redis.call('HSET', state, 'started_ms', now_ms()) end
  if ending ~= '' then
    local job = string.format(job_of, id)
    close(id, state, leases, job, webhooks, ended, ending, entries[#entries])
    keep(id, retention_ms, log, state)
  end
  return { 'ok', first + count, cancel }
end

local verdicts = {}
local at = 9
while at <= #ARGV do
  -- What is wrong with one stream must not stop the others.
  local fine, verdict = pcall(append_for, at)
  if not fine then
    verdict = { type(verdict) == 'table' and verdict.err or tostring(verdict), 0, 0 }
  end
  verdicts[#verdicts + 1] = verdict
  at = at + 6 + 2 * tonumber(ARGV[at + 5])
end
return verdicts
