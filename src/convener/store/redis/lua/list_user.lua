#!lua flags=no-writes
-- LIST_USER: a page of a user's conversations, newest first, ties by id descending, strictly after a place.
-- KEYS 1 conversations of the user
-- ARGV 1 limit  2 activity (ms) of the place ('' for the beginning)  3 cid of the place
-- ->   {cid, activity, …}
if ARGV[1] == '0' then return {} end
local first = 0
if ARGV[2] ~= '' then
  -- Ranks, not scores: any number of conversations may share one ms. Bisect among those that do.
  local low = redis.call('ZCOUNT', KEYS[1], '(' .. ARGV[2], '+inf')
  local high = redis.call('ZCOUNT', KEYS[1], ARGV[2], '+inf')
  while low < high do
    local middle = math.floor((low + high) / 2)
    if redis.call('ZREVRANGE', KEYS[1], middle, middle)[1] >= ARGV[3] then low = middle + 1 else high = middle end
  end
  first = low
end
return redis.call('ZREVRANGE', KEYS[1], first, first + tonumber(ARGV[1]) - 1, 'WITHSCORES')
