#!lua flags=allow-oom
-- FORGET: drop a burial after a time; the caller has seen that the node's hash is empty (core.membership.forget).
-- KEYS 1 dead  2 why
-- ARGV 1 incarnation  2 time it is kept (ms)
-- ->   1 if dropped else 0
-- @include now
local buried = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not buried or now - tonumber(buried) < tonumber(ARGV[2]) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
-- Nodes of the version before forget the one and not the other.
for _, name in ipairs(redis.call('HKEYS', KEYS[2])) do
  if not redis.call('ZSCORE', KEYS[1], name) then redis.call('HDEL', KEYS[2], name) end
end
return 1
