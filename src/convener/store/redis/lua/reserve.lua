#!lua
-- RESERVE: register, then check, own registration counted (core.admission.reserve).
-- KEYS 1 slots  2 wait
-- ARGV 1 cid  2 nonce  3 incarnation  4 raised limit (0: none)  5 slot value that was read ('' for none)
-- ->   {'OK', slot before or nil} | {'HELD', slot} | {'LIMIT', nil, count}
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held then
  if string.match(held, '^([^|]*)|') ~= ARGV[2] and held ~= ARGV[5] then return {'HELD', held} end
end
local waiting, rank, own = redis.call('ZRANGE', KEYS[2], 0, -1), nil, nil
for i, entry in ipairs(waiting) do
  if string.match(entry, '^([^|]*)|') == ARGV[1] then
    rank, own = i - 1, entry
    break
  end
end
if not held then
  local limit, count = tonumber(ARGV[4]), redis.call('HLEN', KEYS[1])
  if limit > 0 and count + 1 + (rank or #waiting) >= limit then return {'LIMIT', false, count} end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. ARGV[3])
if own then redis.call('ZREM', KEYS[2], own) end
return {'OK', held}
