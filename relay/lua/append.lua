-- The only way into a log once it is born.
-- KEYS: log, state, channel, leases, job, webhooks
-- ARGV: id, attempt, owner, first seq, ttl_ms, terminal kind or '', then kind, data, kind, data, …
-- Returns {verdict, next seq, cancel asked (0|1)}. What already stands is not appended again. If
-- `next` is below `first`, the log lost its tail: nothing was appended, begin again at `next`.
-- verdict: 'ok', 'fenced' (another attempt owns the stream, or Redis forgot this one), 'closed',
-- 'erased'
local log, state, channel, leases, job, webhooks = unpack(KEYS)
local id, attempt, owner, first, ttl_ms, ending = unpack(ARGV, 1, 6)
first = tonumber(first)

local s = redis.call('HMGET', state, 'attempt', 'next', 'ended', 'cancel', 'owner')
if not s[1] or redis.call('EXISTS', log) == 0 then return { 'erased', 0, 0 } end
-- The owner stays noted on a stream that it closed: it may ask once more whether that stands.
if s[1] ~= attempt or s[5] ~= owner then return { 'fenced', 0, 0 } end
local top = tonumber(s[2])
if s[3] then return { 'closed', top, 0 } end
local cancel = s[4] and 1 or 0
if top < first then return { 'ok', top, cancel } end

local entries = {}
for i = 7 + 2 * (top - first), #ARGV do entries[#entries + 1] = ARGV[i] end
if #entries == 0 then return { 'ok', top, cancel } end
append(log, state, channel, attempt, top, entries)
if entries[1] == 'started' then redis.call('HSET', state, 'started_ms', now_ms()) end
if ending ~= '' then close(id, state, leases, job, webhooks, ending) end
keep(ttl_ms, log, state, job)
return { 'ok', top + #entries / 2, cancel }
