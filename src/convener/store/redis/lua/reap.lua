#!lua flags=allow-oom
-- REAP: bury the members whose lease has passed (core.membership.reap).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 the caller's ttl (ms)  3 the caller
-- ->   buried incarnations
-- @include now
-- @include membership
local ttl = tonumber(ARGV[2])
feel(ttl)
-- What lies beyond any lease was written before the clock was set back (core.membership._within_reach).
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. text(now + ttl), '+inf')) do
  local row = redis.call('HGET', KEYS[3], name)
  local longest = now + (row and terms(row) or 0)
  if tonumber(redis.call('ZSCORE', KEYS[1], name)) > longest then
    redis.call('ZADD', KEYS[1], text(longest), name)
  end
end
if grace() > now + ttl then
  local longest = ttl
  for _, row in ipairs(redis.call('HVALS', KEYS[3])) do longest = math.max(longest, (terms(row))) end
  redis.call('SET', KEYS[6], text(math.min(grace(), now + longest)))
end
if now < grace() then return {} end
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', text(now))
if #names > 0 then bury(ARGV[1], names, 'reaped', ARGV[3]) end
return names
