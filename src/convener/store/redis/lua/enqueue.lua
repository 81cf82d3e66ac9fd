#!lua
-- ENQUEUE: enter the queue once per conversation; again: incarnation and reason are replaced, the place is kept.
-- KEYS 1 wait
-- ARGV 1 cid  2 incarnation  3 reason  4 most entries
-- ->   1 | 0 if it is full
-- @include now
local entries = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #entries, 2 do
  local cid = string.match(entries[i], '^([^|]*)|')
  if cid == ARGV[1] then
    redis.call('ZREM', KEYS[1], entries[i])
    redis.call('ZADD', KEYS[1], entries[i + 1], ARGV[1] .. '|' .. ARGV[2] .. '|' .. ARGV[3])
    return 1
  end
end
if #entries / 2 >= tonumber(ARGV[4]) then return 0 end
-- Order of arrival also within one ms: the fraction counts, in steps that a double of this size still holds.
local score = now
if #entries > 0 then score = math.max(score, tonumber(entries[#entries]) + 1 / 2048) end
redis.call('ZADD', KEYS[1], string.format('%.17g', score), ARGV[1] .. '|' .. ARGV[2] .. '|' .. ARGV[3])
return 1
