#!lua flags=allow-oom
-- REBURY: write burials again that the store has lost (core.membership.rebury).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2… incarnations
-- ->   how many were not buried
-- @include now
-- @include membership
local names = {}
for i = 2, #ARGV do
  if not redis.call('ZSCORE', KEYS[2], ARGV[i]) then names[#names + 1] = ARGV[i] end
end
for _, name in ipairs(names) do
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[3], name)
  redis.call('ZADD', KEYS[2], text(now), name)
end
if #names > 0 then announce(ARGV[1]) end
return #names
