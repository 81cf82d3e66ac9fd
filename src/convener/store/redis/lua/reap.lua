#!lua flags=allow-oom
-- REAP: bury the members whose lease has passed (core.membership.reap).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 the caller's ttl (ms)  3 the caller
-- ->   buried incarnations
-- @include now
-- @include membership
feel(tonumber(ARGV[2]))
if now < grace() then return {} end
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', text(now))
if #names > 0 then bury(ARGV[1], names, 'reaped', ARGV[3]) end
return names
