-- Notes how many viewers a process has on streams. A note and its end come in one atom: a process that
-- died between the two would leave a key that stands for ever.
-- KEYS: viewers key of each stream
-- ARGV: process, seconds that a note stands, then for each stream the number, 0 for none
local process, seconds = unpack(ARGV)
local now = math.floor(now_ms() / 1000)

for i, key in ipairs(KEYS) do
  local count = tonumber(ARGV[i + 2])
  redis.call('HDEL', key, process) -- a full memory must not stop what frees some
  if count > 0 then
    redis.call('HSET', key, process, string.format('[%d, %d]', count, now))
    redis.call('EXPIRE', key, seconds)
  end
end
